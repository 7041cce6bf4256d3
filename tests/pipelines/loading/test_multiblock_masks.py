"""Multi-block masks: our contract, and the statistics and faults of the original in legacy mode."""

from __future__ import annotations

import time

import numpy as np
import pytest

from models.image_size import Grid
from models.keyed_random.arrays import key_of, permutation, sample_keys, uniforms
from pipelines.config.data import MaskConfig
from pipelines.loading.masks import multiblock as masking
from pipelines.loading.masks.multiblock import (
    block_shapes,
    legacy_masks,
    mask_lengths,
    multiblock_masks,
)

DEFAULT = MaskConfig()
LEGACY = MaskConfig(truncate="legacy")


def square(side: int) -> Grid:
    return Grid(side, side)


def keys(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return sample_keys([i.to_bytes(16, "little") for i in range(count)], seed, epoch)


def coverage(ids: np.ndarray, grid: int) -> np.ndarray:
    """Share of samples in which each token occurs, [grid, grid]; at most once a row of `ids`."""
    counts = np.bincount(ids.reshape(-1), minlength=grid * grid)
    return counts.reshape(grid, grid) / len(ids)


def assert_contract(context: np.ndarray, target: np.ndarray, grid: int, cfg: MaskConfig) -> None:
    keep, kept_target = mask_lengths(square(grid), cfg)
    assert context.shape[1:] == (keep,)
    assert target.shape[1:] == (cfg.num_targets, kept_target)
    for ids in (context, target):
        assert ids.min() >= 0
        assert ids.max() < grid * grid
        assert (np.diff(ids, axis=-1) > 0).all(), "not ascending, or a token twice"
    present = np.zeros((len(context), grid * grid), bool)
    np.put_along_axis(present, context.astype(np.int64), True, 1)
    hits = np.take_along_axis(present, target.reshape(len(target), -1).astype(np.int64), 1)
    assert not hits.any(), "context and targets overlap"


# --- keys and draws


def test_keys_and_uniforms_are_frozen() -> None:
    # Other numbers here mean that every run's masks, crops and order have changed.
    assert hex(int(key_of(1, 2, 3))) == "0xd0734750fde362b3"
    one = sample_keys([bytes(range(16))], 0, 0)
    assert permutation(key_of(9), 6).tolist() == [5, 0, 1, 3, 4, 2]
    context, target = multiblock_masks(one, square(8), DEFAULT)
    assert context[0].tolist() == [4, 6, 7, 15, 16, 24, 33, 40, 42, 48, 49, 51, 56, 58, 59, 63]
    assert target[0, 0].tolist() == [9, 10, 11, 12, 18, 25, 26, 27, 28]
    _, target = legacy_masks(key_of(0, 0), 4, square(8), LEGACY)
    assert target[0, 0].tolist() == [4, 5, 6, 12, 13, 14, 20, 21, 22]


def test_uniforms_are_uniform_and_streams_independent() -> None:
    a, b = uniforms(keys(20_000), 1, 4), uniforms(keys(20_000), 2, 4)
    assert a.min() >= 0
    assert a.max() < 1
    counts = np.histogram(a, 64, (0, 1))[0]
    expected = a.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 63 d.o.f., p = 2e-4
    together = np.concatenate([a, b], 1)
    assert np.abs(np.corrcoef(together.T) - np.eye(8)).max() < 0.03


def test_sample_keys_take_any_form_of_16_bytes() -> None:
    ids = [bytes([i] * 15 + [0]) for i in range(5)]  # trailing zeros: numpy's S type hides them
    expected = sample_keys(ids, 1, 2)
    assert (sample_keys(np.array(ids, "S16"), 1, 2) == expected).all()
    assert (
        sample_keys(np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16), 1, 2) == expected
    ).all()
    assert len(set(expected.tolist()) | set(sample_keys(ids, 1, 3).tolist())) == 10
    with pytest.raises(ValueError, match="16 bytes"):
        sample_keys([b"short"], 0, 0)


# --- the contract


@pytest.mark.parametrize("grid", [2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 28, 32])
def test_contract_on_every_grid(grid: int) -> None:
    context, target = multiblock_masks(keys(300), square(grid), DEFAULT)
    assert_contract(context, target, grid, DEFAULT)


def test_default_lengths() -> None:
    lengths = {grid: mask_lengths(square(grid), DEFAULT)[0] for grid in (4, 8, 12, 14, 16)}
    assert lengths == {4: 5, 8: 16, 12: 40, 14: 64, 16: 88}
    assert mask_lengths(square(14), DEFAULT)[1] == 30


def test_a_mask_does_not_depend_on_the_batch() -> None:
    context, target = multiblock_masks(keys(500), square(14), DEFAULT)
    some = np.random.default_rng(0).permutation(500)[:100]
    context_some, target_some = multiblock_masks(keys(500)[some], square(14), DEFAULT)
    assert (context[some] == context_some).all()
    assert (target[some] == target_some).all()
    other, _ = multiblock_masks(keys(500, epoch=1), square(14), DEFAULT)
    assert (other != context).any(1).mean() > 0.99
    other, _ = multiblock_masks(keys(500, seed=1), square(14), DEFAULT)
    assert (other != context).any(1).mean() > 0.99


def test_no_samples() -> None:
    context, target = multiblock_masks(np.zeros(0, np.uint64), square(14), DEFAULT)
    assert context.shape == (0, 64)
    assert target.shape == (0, 4, 30)


@pytest.mark.parametrize("grid", [7, 8, 12, 14, 16, 28])
def test_block_shapes_are_in_range(grid: int) -> None:
    shapes, probabilities = block_shapes(square(grid), (0.15, 0.2), (0.75, 1.5))
    areas = np.array([h * w for h, w in shapes])
    assert areas.min() >= np.floor(0.15 * grid**2)
    assert areas.max() <= np.ceil(0.2 * grid**2)
    assert sum(probabilities) == pytest.approx(1)
    assert mask_lengths(square(grid), DEFAULT)[1] == areas.min()


def test_scale_and_ratio_are_independent_draws() -> None:
    shapes = dict(zip(*block_shapes(square(28), (0.15, 0.2), (0.75, 1.5)), strict=True))

    def mean_log_ratio(low: float, high: float) -> float:
        chosen = [(h, w, p) for (h, w), p in shapes.items() if low <= h * w < high]
        return sum(p * np.log(h / w) for h, w, p in chosen) / sum(p for *_, p in chosen)

    assert mean_log_ratio(117, 130) == pytest.approx(mean_log_ratio(145, 158), abs=0.08)
    # Control: in the original a small block is always flat and a large one always tall.
    sizes = [masking._legacy_size(r, square(28), (0.15, 0.2), (0.75, 1.5)) for r in (0.02, 0.98)]
    assert sizes[0][0] < sizes[0][1]
    assert sizes[1][0] > sizes[1][1]


def test_target_coverage_is_that_of_uniform_positions() -> None:
    grid = 14
    _, target = multiblock_masks(keys(30_000), square(grid), DEFAULT)
    found = coverage(target.reshape(-1, target.shape[-1]), grid)
    expected = np.zeros((grid, grid))
    keep = mask_lengths(square(grid), DEFAULT)[1]
    for (h, w), p in zip(*block_shapes(square(grid), (0.15, 0.2), (0.75, 1.5)), strict=True):
        places = [(t, x) for t in range(grid - h + 1) for x in range(grid - w + 1)]
        for top, left in places:
            expected[top : top + h, left : left + w] += p / len(places) * keep / (h * w)
    inner = np.s_[1:-1, 1:-1]
    assert np.abs(found[inner] / expected[inner] - 1).max() < 0.05
    assert np.abs(found / expected - 1).max() < 0.15


def test_small_blocks_cover_the_inside_evenly() -> None:
    cfg = MaskConfig(target_scale=(0.02, 0.03))
    _, target = multiblock_masks(keys(8_000), square(28), cfg)
    inside = coverage(target.reshape(-1, target.shape[-1]), 28)[5:-5, 5:-5]
    # A single cell's count has a sampling error of 4%; a row's or a column's mean, of 1%.
    for profile in (inside.mean(0), inside.mean(1)):
        assert np.abs(profile / inside.mean() - 1).max() < 0.05
    assert inside.std() / inside.mean() < 0.05


def test_every_row_and_column_is_context_and_target() -> None:
    context, target = multiblock_masks(keys(5000), square(14), DEFAULT)
    for ids in (context, target.reshape(-1, target.shape[-1])):
        found = coverage(ids, 14)
        assert (found > 0).all()
        for edge in (found[0], found[-1], found[:, 0], found[:, -1]):
            assert edge.mean() > 0.02


def test_context_sees_top_and_bottom_alike() -> None:
    context, _ = multiblock_masks(keys(20_000), square(14), DEFAULT)
    found = coverage(context, 14)
    for mirrored in (found[::-1], found[:, ::-1], found[::-1, ::-1]):
        assert np.abs(found - mirrored).max() < 0.05 * found.mean() + 0.005


def test_a_batch_costs_far_less_than_its_samples_one_by_one() -> None:
    """A batch costs about 1/18 of a loop over its samples, timed side by side."""

    def seconds(batch: np.ndarray, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            multiblock_masks(batch, square(14), DEFAULT)
            times.append(time.process_time() - start)
        return min(times)

    batch = keys(2048)
    seconds(batch, 1)
    assert seconds(batch, 5) < len(batch) * seconds(batch[:1], 50) / 4


# --- extreme and impossible settings


@pytest.mark.parametrize("grid", [4, 8, 14])
def test_context_keep_at_the_limit_is_still_exact(grid: int) -> None:
    _, kept_target = mask_lengths(square(grid), DEFAULT)
    for keep in (grid * grid - kept_target, grid * grid - 2 * kept_target):
        cfg = MaskConfig(context_keep=keep)
        context, target = multiblock_masks(keys(64), square(grid), cfg)
        assert_contract(context, target, grid, cfg)


def test_many_large_targets_terminate() -> None:
    cfg = MaskConfig(num_targets=12, target_scale=(0.3, 0.4))
    context, target = multiblock_masks(keys(64), square(14), cfg)
    assert_contract(context, target, 14, cfg)


@pytest.mark.parametrize(
    ("grid", "cfg", "flag"),
    [
        (14, MaskConfig(context_keep=170), "--mask.context-keep"),
        (1, DEFAULT, "--model.patch-size"),
        (4, MaskConfig(target_scale=(1.0, 1.0), target_ratio=(1.0, 1.0)), "--mask.target-scale"),
        (14, LEGACY, "--mask.truncate"),
    ],
)
def test_impossible_settings_name_the_flag(grid: int, cfg: MaskConfig, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        mask_lengths(square(grid), cfg)


# --- legacy


@pytest.mark.parametrize(
    ("grid", "batch", "kept", "kept_target", "tolerance"),
    [  # the published table; means over many batches, each batch's length has a spread of about 7
        (14, 16, 58, None, 2.5),
        (14, 64, 52, None, 1.5),
        (14, 128, 50, None, 1.0),
        (14, 256, 48, None, 1.5),
        (16, 128, 69.3, 44.0, 1.5),
        (12, 256, 33, 25, 2.0),
        (8, 256, 10, 11, 1.5),
    ],
)
def test_legacy_statistics(
    grid: int, batch: int, kept: float, kept_target: float | None, tolerance: float
) -> None:
    drawn = [legacy_masks(key_of(1, i), batch, square(grid), LEGACY) for i in range(300)]
    assert np.mean([context.shape[1] for context, _ in drawn]) == pytest.approx(kept, abs=tolerance)
    if kept_target is not None:
        found = np.mean([target.shape[2] for _, target in drawn])
        assert found == pytest.approx(kept_target, abs=1.0)


def test_legacy_context_before_truncation() -> None:
    sizes, shapes = [], set()
    for i in range(200):
        key = key_of(2, i)
        _, target = legacy_masks(key, 64, square(14), LEGACY)
        shapes.add(target.shape[2])
        union = np.zeros((64, 196), bool)
        np.put_along_axis(union, target.reshape(64, -1).astype(np.int64), True, 1)
        sizes.append(13 * 13 - union.sum(1).mean())  # the context block is rows and columns 0..12
    assert np.mean(sizes) == pytest.approx(82, abs=1.5)
    assert shapes == {30, 35, 36, 40}


def test_legacy_control_last_row_and_column_are_never_reached() -> None:
    for i in range(50):
        context, target = legacy_masks(key_of(3, i), 64, square(14), LEGACY)
        for ids in (context, target):
            assert (ids // 14).max() < 13
            assert (ids % 14).max() < 13


def test_legacy_control_truncation_starves_the_bottom() -> None:
    seen = np.zeros((14, 14))
    for i in range(100):
        context, _ = legacy_masks(key_of(4, i), 128, square(14), LEGACY)
        seen += coverage(context, 14) / 100
    top, bottom = seen[:4, :13].mean(), seen[9:13, :13].mean()
    assert top == pytest.approx(0.54, abs=0.06)
    assert bottom < 0.1
    context, _ = multiblock_masks(keys(5000), square(14), DEFAULT)
    ours = coverage(context, 14)
    assert ours[9:13].mean() > 0.9 * ours[1:5].mean()


@pytest.mark.parametrize("grid", [2, 3, 4, 5, 7, 8])
def test_legacy_terminates_on_small_grids(grid: int) -> None:
    for i in range(20):
        context, target = legacy_masks(key_of(5, i), 64, square(grid), LEGACY)
        assert context.shape[1] >= 1
        present = np.zeros((64, grid * grid), bool)
        np.put_along_axis(present, context.astype(np.int64), True, 1)
        assert (np.diff(context, axis=1) > 0).all()
        assert target.shape[:2] == (64, 4)
    with pytest.raises(ValueError, match="patch-size"):
        legacy_masks(key_of(0), 8, square(1), LEGACY)
