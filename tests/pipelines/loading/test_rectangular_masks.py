"""Masks on grids that are not square, checked by brute force.

Shape suffixes: B samples, K context tokens, M target blocks, T target tokens.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.image_size import Grid
from models.keyed_random.arrays import key_of, sample_keys
from pipelines.config.data import MaskConfig, VideoMaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.loading.masks.maskers import make_masker
from pipelines.loading.masks.multiblock import (
    block_shapes,
    cover_blocks,
    legacy_masks,
    mask_lengths,
    multiblock_masks,
    place_blocks,
    usual_context,
)
from pipelines.loading.masks.spacetime import legacy_video_masks, video_mask_lengths, video_masks

DEFAULT = MaskConfig()
GRIDS = [Grid(9, 16), Grid(16, 9), Grid(4, 9), Grid(2, 8), Grid(10, 25), Grid(12, 13), Grid(1, 16)]


def keys(count: int) -> np.ndarray:
    return sample_keys([i.to_bytes(16, "little") for i in range(count)], 0, 0)


def assert_seen_everywhere(ids: np.ndarray, grid: Grid) -> None:
    """Every token of the grid occurs in `ids`, and nothing else does."""
    assert set(np.unique(ids).tolist()) == set(range(grid.tokens))


# --- the shapes of blocks


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0)), ((0.3, 0.6), (0.2, 5.0))],
)
def test_blocks_fit_and_keep_the_scale(
    grid: Grid, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    shapes, probabilities = block_shapes(grid, scale, ratio)
    assert sum(probabilities) == pytest.approx(1)
    assert list(shapes) == sorted(shapes, key=lambda shape: (shape[0] * shape[1], *shape))
    areas = np.array([h * w for h, w in shapes])
    assert all(1 <= h <= grid.rows and 1 <= w <= grid.columns for h, w in shapes)
    assert areas.min() >= math.floor(scale[0] * grid.per_step)
    assert areas.max() <= math.ceil(scale[1] * grid.per_step)


def test_a_block_that_fits_has_its_ratio_in_tokens() -> None:
    shapes, _ = block_shapes(Grid(9, 16), (0.25, 0.25), (1.0, 1.0))  # 36 tokens
    assert shapes == ((6, 6),)
    shapes, _ = block_shapes(Grid(9, 16), (1 / 8, 1 / 8), (2.0, 2.0))  # 18 tokens
    assert shapes == ((6, 3),)


@pytest.mark.parametrize(("rows", "columns"), [(9, 16), (16, 9), (3, 30)])
def test_a_block_that_does_not_fit_fills_the_short_side(rows: int, columns: int) -> None:
    shapes, _ = block_shapes(Grid(rows, columns), (0.85, 1.0), (1.0, 1.0))
    short = min(rows, columns)
    long = [max(shape) for shape in shapes]
    assert {min(shape) for shape in shapes} == {short}
    assert long == list(range(math.ceil(0.85 * max(rows, columns)), max(rows, columns) + 1))
    assert {shape.index(short) for shape in shapes} == {0 if rows < columns else 1}


def test_the_shapes_of_a_transposed_grid_are_transposed() -> None:
    shapes, probabilities = block_shapes(Grid(9, 16), (0.5, 0.9), (0.5, 2.0))
    found = dict(zip(*block_shapes(Grid(16, 9), (0.5, 0.9), (1.0, 1.0)), strict=True))
    wide = dict(zip(*block_shapes(Grid(9, 16), (0.5, 0.9), (1.0, 1.0)), strict=True))
    assert wide == {(h, w): share for (w, h), share in found.items()}
    means = np.average(np.array(shapes), axis=0, weights=probabilities)
    assert means[0] < 9 < means[1]


def test_every_place_of_a_block_can_be_drawn_and_is_covered() -> None:
    grid, shapes = Grid(3, 5), ((((2, 3)),), (1.0,))
    draws = np.stack(np.meshgrid([0.5], [0.0, 0.999], [0.0, 0.5, 0.999]), -1).reshape(-1, 1, 3)
    blocks = place_blocks(draws, grid, shapes)
    assert {tuple(b) for b in blocks[:, 0].tolist()} == {
        (top, left, 2, 3) for top in (0, 1) for left in (0, 1, 2)
    }
    for (top, left, height, width), covered in zip(
        blocks[:, 0].tolist(), cover_blocks(blocks, grid), strict=True
    ):
        inside = {
            row * 5 + column
            for row in range(top, top + height)
            for column in range(left, left + width)
        }
        assert set(np.flatnonzero(covered).tolist()) == inside


# --- images


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_multiblock_masks(grid: Grid) -> None:
    keep, kept_target = mask_lengths(grid, DEFAULT)
    context_BK, target_BMT = multiblock_masks(keys(1000), grid, DEFAULT)
    assert context_BK.shape == (1000, keep)
    assert target_BMT.shape == (1000, 4, kept_target)
    assert kept_target >= math.floor(0.15 * grid.per_step)
    for ids in (context_BK, target_BMT):
        assert_seen_everywhere(ids, grid)
        assert (np.diff(ids, axis=-1) > 0).all()
    for context_K, target_MT in zip(context_BK, target_BMT, strict=True):
        assert not set(context_K.tolist()) & set(target_MT.ravel().tolist())
        for target_T in target_MT:  # inside one block of a legal size
            rows, columns = target_T // grid.columns, target_T % grid.columns
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert box <= math.ceil(0.2 * grid.per_step)


def test_a_context_goes_with_the_tokens_not_with_the_shape() -> None:
    assert usual_context(Grid(9, 16)) == usual_context(Grid(12, 12)) == 40
    assert usual_context(Grid(8, 32)) == usual_context(Grid(16, 16)) == 88
    assert usual_context(Grid(2, 8)) == usual_context(Grid(4, 4)) == 5
    for wide, square in ((Grid(9, 16), Grid(12, 12)), (Grid(14, 28), Grid(20, 20))):
        keep = {grid: mask_lengths(grid, DEFAULT)[0] / grid.per_step for grid in (wide, square)}
        assert keep[wide] == pytest.approx(keep[square], rel=0.1)


def test_wide_contexts_reach_both_ends() -> None:
    """A context of one square block would leave 4 of 16 columns out."""
    grid = Grid(9, 16)
    context_BK, _ = multiblock_masks(keys(1000), grid, DEFAULT)
    columns = np.ptp(context_BK % grid.columns, axis=1) + 1
    assert np.mean(columns >= 13) > 0.9


def test_legacy_masks_cut_blocks_as_the_original_does() -> None:
    """The last row and column are never reached, and no side of a block grows."""
    grid = Grid(9, 16)
    for i in range(20):
        context_BK, target_BMT = legacy_masks(key_of(0, i), 32, grid, MaskConfig(truncate="legacy"))
        for ids in (context_BK, target_BMT):
            assert (ids // grid.columns).max() < grid.rows - 1
            assert (ids % grid.columns).max() < grid.columns - 1
        assert (np.ptp(context_BK % grid.columns, axis=1) + 1 <= 12).all()
        offsets = target_BMT - target_BMT[..., :1]  # all blocks of a batch have one shape
        assert (offsets == offsets[0, 0]).all()
    with pytest.raises(ValueError, match="2x2 grid, got 1x16"):
        legacy_masks(key_of(0), 4, Grid(1, 16), MaskConfig(truncate="legacy"))


# --- clips


@pytest.mark.parametrize(
    "cfg",
    [
        VideoMaskConfig(),
        VideoMaskConfig(kind="tube", tube_ratio=0.8),
        VideoMaskConfig(blocks=(3,), scale=(0.3,), temporal_scale=(0.5,)),
    ],
    ids=("default", "tube", "short"),
)
@pytest.mark.parametrize("grid", [Grid(9, 16, 4), Grid(8, 4, 2), Grid(2, 10, 3)], ids=str)
def test_clip_masks(grid: Grid, cfg: VideoMaskConfig) -> None:
    masks = video_masks(keys(1000), grid, cfg)
    for g, lengths in enumerate(video_mask_lengths(grid, cfg)):
        context, target = masks[g]
        assert (context.shape[1], target.shape[1]) == lengths
        assert_seen_everywhere(target, grid)
        if g == 0:  # two blocks of 70% of a wide grid always hide its middle
            assert_seen_everywhere(context, grid)
        both = np.concatenate([context, target], 1)
        assert all(len(set(row)) == len(row) for row in both.tolist())
        assert (np.diff(context, axis=1) > 0).all()
        assert (np.diff(target, axis=1) > 0).all()


def test_a_tube_hides_the_same_places_at_all_times() -> None:
    grid = Grid(4, 9, 5)
    ((context, target),) = video_masks(keys(50), grid, VideoMaskConfig(kind="tube"))
    assert target.shape == (50, 5 * round(0.9 * 36))
    for ids in (context, target):
        by_time = ids.reshape(50, 5, -1)
        assert (by_time % 36 == by_time[:, :1] % 36).all()


def test_legacy_clip_masks_hide_blocks_of_one_size() -> None:
    cfg = VideoMaskConfig(blocks=(1,), scale=(0.7,), temporal_scale=(1.0,), truncate="legacy")
    grid = Grid(9, 16, 2)
    for i in range(10):
        ((context, target),) = legacy_video_masks(key_of(i), 16, grid, cfg)
        assert context.shape[1] + target.shape[1] == grid.tokens  # one block, so nothing is cut
        first = target[:, : target.shape[1] // 2]
        height = np.ptp(first // 16, axis=1) + 1
        width = np.ptp(first % 16, axis=1) + 1
        assert (height * width == first.shape[1]).all()
        assert height.max() <= 9
        assert width.max() <= math.ceil(math.sqrt(100 / 0.75))


# --- from the configuration


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("ijepa", {"context_ids": (3, 10), "target_ids": (3, 4, 4)}),
        ("mae", {"context_ids": (3, 8), "target_ids": (3, 1, 24)}),
        ("dmjd", {"context_ids": (3, 4, 24), "target_ids": (3, 4, 8)}),
    ],
)
def test_maskers_take_rows_and_columns_of_the_model(name: str, shapes: dict) -> None:
    model = ModelConfig(encoder="vit_micro32", image_size=(32, 64), patch_size=8)
    masker = make_masker(PretrainConfig(model=model, objective=ObjectiveConfig(name=name)))
    masker.check()
    masks = masker.for_samples(keys(3))
    assert {key: ids.shape for key, ids in masks.items()} == shapes
    assert max(ids.max() for ids in masker.for_samples(keys(100)).values()) == 31


def test_a_clip_masker_takes_the_time_steps_too() -> None:
    model = ModelConfig(image_size=(32, 64), patch_size=8, frames=8, tubelet=2)
    masker = make_masker(PretrainConfig(model=model, objective=ObjectiveConfig(name="vjepa")))
    ids = np.concatenate([part.ravel() for part in masker.for_samples(keys(200)).values()])
    assert set(ids.tolist()) == set(range(4 * 4 * 8))


@pytest.mark.parametrize(
    ("grid", "cfg", "flag"),
    [
        (Grid(1, 3), DEFAULT, "--model.patch-size: a 1x3 patch grid"),
        (Grid(4, 9), MaskConfig(context_keep=33), "--mask.context-keep: at most 30 of 36"),
        (Grid(2, 8), MaskConfig(target_scale=(1.0, 1.0)), "--mask.target-scale: .* 2x8 grid"),
    ],
)
def test_impossible_settings_name_the_flag(grid: Grid, cfg: MaskConfig, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        mask_lengths(grid, cfg)
