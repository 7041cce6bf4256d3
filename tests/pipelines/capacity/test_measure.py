"""What --measure measures, on this machine, in a second or so each."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers.pipelines.fake_training import change
from helpers.pipelines.loading import config, write_samples
from pipelines.capacity import measure as measuring
from pipelines.capacity.clusters import find_cluster
from pipelines.capacity.constants import Constant, assumed
from pipelines.capacity.measure import Size, fitting_size, measure, measure_training
from pipelines.capacity.measure_data import measure_data
from pipelines.capacity.measure_exchange import measure_exchange
from pipelines.capacity.step_cost import StepCost
from pipelines.recipes.images import debug, ijepa_vith14_in1k
from pipelines.training import collapse

SMALL = StepCost(
    trained=10**6,
    frozen=10**6,
    matrices=10**6,
    forward_flops=1e7,
    backward_flops=1e7,
    parts={},
    kept_bytes=1e5,
    cast_bytes=0.0,
    block_bytes=1e5,
)
LARGE = dataclasses.replace(
    SMALL, trained=65 * 10**7, forward_flops=5e11, backward_flops=3e11, kept_bytes=2e8
)


def is_sound(constant: Constant) -> bool:
    return 0 < constant.low <= constant.value <= constant.high


def test_training_is_measured_as_the_trainer_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TIMED_S", 0.1)
    seen: list[int] = []
    update = collapse.CollapseWatch.update

    def counted(self: collapse.CollapseWatch, pooled_BD: torch.Tensor) -> None:
        seen.append(len(pooled_BD))
        update(self, pooled_BD)

    monkeypatch.setattr(collapse.CollapseWatch, "update", counted)
    before = torch.get_num_threads()
    found = measure_training(change(debug(), run={"threads": 1}), Size(32, None))
    assert set(found) == {"compute_flops", "update_bytes_s", "checkpoint_bytes_s"}
    assert all(is_sound(constant) for constant in found.values())
    assert set(seen) == {32}
    assert len(seen) >= measuring.LEAST_STEPS + 2  # two steps to warm up
    assert torch.get_num_threads() == before


def test_a_model_too_large_for_this_machine_is_measured_in_part() -> None:
    small, large = debug(), change(ijepa_vith14_in1k(), run={"gpu": False})
    sizes = {}
    for cfg, cost in ((small, SMALL), (large, LARGE)):
        sizes[cfg] = fitting_size(cfg, cost, assumed(cfg, find_cluster(cfg, "this"), 1e5))
    assert sizes[small] == Size(32, None)
    assert sizes[large].samples <= 8
    assert sizes[large].depth is not None
    assert sizes[large].depth < 32


def test_reading_and_decoding_are_measured_on_the_runs_shards(tmp_path) -> None:
    cfg = config(write_samples(tmp_path))
    found = measure_data(cfg)
    assert set(found) == {"read_cpu_s", "decode_cpu_s", "read_bytes_s"}
    assert all(is_sound(constant) for constant in found.values())
    assert 1e-6 < found["decode_cpu_s"].value < 0.1


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = ijepa_vith14_in1k()
    cluster = find_cluster(cfg, "p4d")
    found, notes = measure(cfg, cluster, LARGE, assumed(cfg, cluster, 1e5))
    assert found == {}
    assert [note.partition(":")[0] for note in notes] == [
        "speed of training",
        "reading and decoding",
        "exchange of gradients between GPUs",
        "the network between hosts",
    ]


def test_exchange_between_two_processes_is_measured() -> None:
    assert is_sound(measure_exchange(2))


def test_measured_constants_replace_the_assumed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TIMED_S", 0.2)
    cfg = debug()
    cluster = find_cluster(cfg, "this")
    guess = assumed(cfg, cluster, 3000)
    found, _ = measure(cfg, cluster, SMALL, guess)
    after = dataclasses.replace(guess, **found)
    assert after.compute_flops.source.startswith("measured")
    assert after.decode_cpu_s == guess.decode_cpu_s
