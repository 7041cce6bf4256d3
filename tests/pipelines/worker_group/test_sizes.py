"""Which numbers of workers a run may have, and what a smaller group does differently."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.fake_training import change, tiny_config
from pipelines.config.as_json import from_json, to_json
from pipelines.config.input_flags import workers_flag
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import PretrainConfig
from pipelines.worker_group.sizes import at_size, largest_size


@pytest.fixture
def cfg(tmp_path: Path) -> PretrainConfig:
    """Eight lanes, 32 rows a batch."""
    return change(tiny_config(tmp_path), data={"batch_size": 32, "lanes": 8})


def test_a_range_is_read_and_stored_as_it_is_written(cfg: PretrainConfig) -> None:
    flag = workers_flag("run.workers")
    assert [flag.instance_from_str([text]) for text in ("4", "2..8", "3..3")] == [4, (2, 8), 3]
    assert [flag.str_from_instance(value) for value in (4, (2, 8))] == [["4"], ["2..8"]]
    elastic = change(cfg, run={"workers": (2, 8)})
    assert from_json(PretrainConfig, to_json(elastic)) == elastic


@pytest.mark.parametrize("text", ["0", "8..2", "0..4", "two", "2-8", "2..", "-1"])
def test_what_is_no_number_of_workers_names_the_flag(text: str) -> None:
    with pytest.raises(ValueError, match=r"--run\.workers"):
        workers_flag("run.workers").instance_from_str([text])


def test_a_group_has_sizes_that_share_lanes_and_micro_batches(cfg: PretrainConfig) -> None:
    assert change(cfg, run={"workers": 4}).group_sizes == (4,)
    assert change(cfg, run={"workers": (2, 8)}).group_sizes == (2, 4, 8)
    assert change(cfg, run={"workers": (3, 7)}).group_sizes == (4,)
    assert change(cfg, run={"workers": (1, 8), "accumulate": 16}).group_sizes == (1, 2)


def test_a_range_without_a_size_names_the_flag(cfg: PretrainConfig) -> None:
    with pytest.raises(ValueError, match=r"--run\.workers: .*--data\.lanes \(8\), got 5\.\.7"):
        change(cfg, run={"workers": (5, 7)})
    with pytest.raises(ValueError, match=r"--run\.accumulate"):
        change(cfg, run={"workers": (4, 8), "accumulate": 16})


def test_the_largest_size_that_fits_leaves_cpus_to_read_with() -> None:
    sizes = (2, 4, 8)
    assert largest_size(sizes, fitting=7, free_cpus=100, cpus_per_worker=2) == 4
    assert largest_size(sizes, fitting=8, free_cpus=8.5, cpus_per_worker=1) == 8
    assert largest_size(sizes, fitting=8, free_cpus=8, cpus_per_worker=1) == 4
    assert largest_size(sizes, fitting=1, free_cpus=8, cpus_per_worker=1) == 0


def test_a_smaller_group_keeps_its_micro_batches_as_small(cfg: PretrainConfig) -> None:
    elastic = change(cfg, run={"workers": (1, 8), "accumulate": 2})
    found = {n: at_size(elastic, n).run.accumulate for n in elastic.group_sizes}
    assert found == {1: 16, 2: 8, 4: 4, 8: 2}
    assert at_size(change(cfg, run={"workers": 8}), 2).run.accumulate == 1  # a fixed one, resumed


def test_where_rows_are_compared_the_number_of_micro_batches_stays(cfg: PretrainConfig) -> None:
    vicreg = change(cfg, run={"workers": (1, 8)}, objective={"name": "vicreg"})
    assert at_size(vicreg, 1).run.accumulate == 1
    regularized = ObjectiveConfig(regularize="target_pooled")
    ijepa = change(cfg, run={"workers": (1, 8)})
    assert at_size(PretrainConfig(
        data=ijepa.data, model=ijepa.model, optim=ijepa.optim, run=ijepa.run, objective=regularized
    ), 1).run.accumulate == 1  # fmt: skip
    assert at_size(ijepa, 1).run.accumulate == 8


def test_a_number_is_not_elastic() -> None:
    assert not RunConfig(workers=2).elastic
    assert RunConfig(workers=(1, 2)).elastic
    assert not RunConfig(workers=(2, 2)).elastic
