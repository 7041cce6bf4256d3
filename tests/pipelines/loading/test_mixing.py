"""Mixed batches hold each set's own batches, whatever the number of workers."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.pipelines.loading import (
    assert_equal,
    config,
    encode,
    global_batches,
    picture,
    row_of,
    write_rows,
    write_samples,
)
from pipelines.config.data import DataConfig, MaskConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_manifest
from pipelines.loading.loader import make_reader
from pipelines.loading.mixing import identity_of, training_sets
from pipelines.loading.plan import lane_windows, pieces

LANES = 8


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_samples(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [row_of(encode(picture(900 + i, 24, 20), "PNG"), f"new-{i}") for i in range(60)]
    return write_rows(tmp_path_factory.mktemp("new"), rows)


@pytest.fixture(scope="module")
def mix(new: str, old: str) -> PretrainConfig:
    """Of the four rows of a lane, three are new: an epoch of them has two batches."""
    return config(new, mix=(old,), mix_shares=(0.25,))


@pytest.fixture(scope="module")
def alone(mix: PretrainConfig, ray_local: None) -> list[dict]:
    return global_batches(mix, 1, 0, 7)


@pytest.mark.ray
def test_each_lane_has_its_rows_of_every_set(
    alone: list[dict], mix: PretrainConfig, new: str, old: str
) -> None:
    names = {uri: _ids(uri) for uri in (new, old)}
    for step, batch in enumerate(alone):
        assert batch["sets"].tolist() == [0, 0, 0, 1] * LANES
        ids = [batch["sample_ids"][lane * 4 : lane * 4 + 4] for lane in range(LANES)]
        for uri, rows, one in ((new, slice(0, 3), 0), (old, slice(3, 4), 1)):
            part = training_sets(mix)[one]
            plan = make_reader(mix, 0, 1, part).plan
            (piece,) = pieces(plan, step, step + 1)
            expected = [names[uri][tuple(row)] for row in lane_windows(plan, piece, range(LANES))]
            assert [one for lane in ids for one in lane[rows]] == expected


def _ids(uri: str) -> dict[tuple[int, int, int], bytes]:
    """Sample ids by (shard, row group, row)."""
    from pipelines.dataset.row_groups import read_row_group
    from pipelines.runtime.uris import open_uri

    fs, root = open_uri(uri)
    manifest = read_manifest(uri)
    return {
        (shard, group, row): sample
        for shard, group, _ in manifest.row_groups()
        for row, sample in enumerate(
            read_row_group(fs, root, manifest.shards[shard].file, group)["sample_id"].to_pylist()
        )
    }


@pytest.mark.ray
def test_rows_are_those_of_a_run_on_that_set_alone(alone: list[dict], new: str) -> None:
    """Pixels, crops, masks and keys too; the new set is in its second epoch from step 2 on."""
    single = global_batches(config(new, batch_size=24), 1, 0, 4)
    for mixed, expected in zip(alone[:4], single, strict=True):
        assert mixed["epoch"] == expected["epoch"] == mixed["step"] // 2
        for name in ("images", "sample_keys", "context_ids", "target_ids", "crop_boxes", "flipped"):
            values = np.asarray(mixed[name])
            mine = values.reshape(LANES, 4, *values.shape[1:])[:, :3]
            assert (mine.reshape(-1, *values.shape[1:]) == np.asarray(expected[name])).all(), name


@pytest.mark.ray
def test_neither_workers_nor_resume_nor_place_of_decoding_change_the_mix(
    alone: list[dict], mix: PretrainConfig, new: str, old: str
) -> None:
    assert_equal(global_batches(mix, 2, 3, 7), alone[3:])
    in_data = config(new, mix=(old,), mix_shares=(0.25,), decode_in="data")
    assert_equal(global_batches(in_data, 1, 0, 3), alone[:3])


def test_the_identity_of_a_mix_is_that_of_all_its_sets(new: str, old: str) -> None:
    one, two = read_manifest(new), read_manifest(old)
    assert identity_of([one]) == one.manifest_hash
    assert len({identity_of([one]), identity_of([one, two]), identity_of([two, one])}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mix": ("b",)}, "--data.mix-shares: needs one for each --data.mix"),
        ({"mix_shares": (0.5,)}, "--data.mix-shares: needs one for each --data.mix"),
        ({"mix": ("b",), "mix_shares": (1.0,)}, "--data.mix-shares: must be positive"),
        ({"mix": ("a",), "mix_shares": (0.5,)}, "--data.mix: names a set twice"),
        ({"mix": ("b",), "mix_shares": (0.5,), "batch_size": 8}, "too few for 2 sets"),
    ],
)
def test_mixes_that_cannot_work(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        config("a", **fields)
    assert message in str(caught.value)


def test_shares_are_rounded_to_rows_of_a_lane() -> None:
    shares = {"mix": ("b", "c"), "mix_shares": (0.3, 0.01)}
    assert DataConfig(train="a", batch_size=256, **shares).rows_by_set == (168, 80, 8)
    assert DataConfig(batch_size=256).rows_by_set == (256,)


def test_legacy_masks_are_refused(new: str, old: str) -> None:
    with pytest.raises(ValueError, match=r"--data\.mix: needs masks of a fixed size"):
        config(new, MaskConfig(truncate="legacy"), mix=(old,), mix_shares=(0.5,))
