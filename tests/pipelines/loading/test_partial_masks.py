"""Masks of samples that lack tokens, or have grids of their own.

Shape suffixes: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from models.image_size import ImageSize
from models.keyed_random.arrays import sample_keys
from models.media.fit import Fit
from models.media.regions import Region
from pipelines.config.data import DataConfig, MaskConfig, VideoMaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.loading.masks.crops import fitted_crops
from pipelines.loading.masks.layouts import Layout, draw_crops
from pipelines.loading.masks.maskers import MultiblockMasker, make_masker
from pipelines.loading.masks.multiblock import random_subset, repeated_subset
from pipelines.loading.masks.partial import _divide, _multiblock

HUD: tuple[Region, ...] = ((0, 0.83, 1, 1), (0.75, 0, 1, 0.25))
LOWER_HALF: tuple[Region, ...] = ((0, 0.5, 1, 1),)
SIZES = ((360, 640), (480, 640), (640, 360), (500, 500))
TUBES = 2


def config(
    name: str, fit: Fit = "squash", exclude: tuple[Region, ...] = HUD, **changes: object
) -> PretrainConfig:
    clips = name in ("vjepa", "videomae")
    size: ImageSize = (72, 128)
    model = ModelConfig(
        image_size=size, patch_size=8, fit=fit, exclude=exclude, frames=2 * TUBES if clips else 1,
        tubelet=2 if clips else 1,
    )  # fmt: skip
    return PretrainConfig(model=model, objective=ObjectiveConfig(name=name), **changes)  # type: ignore[arg-type]


def samples(cfg: PretrainConfig, count: int) -> tuple[np.ndarray, np.ndarray, Layout]:
    """Keys, flips and layout of pictures of several aspects."""
    keys = sample_keys([i.to_bytes(16, "little") for i in range(count)], 0, 0)
    sizes = np.tile(np.array(SIZES, np.int32), (count // len(SIZES), 1))
    flipped = np.arange(count) // len(SIZES) % 2 == 1
    layout = draw_crops(keys, sizes, flipped, cfg.model, cfg.data)[1]
    assert layout is not None
    return keys, flipped, layout


def pairs(masks: dict[str, np.ndarray], row: int) -> Iterator[tuple[list[int], list[int]]]:
    """Every context list of a sample, with all tokens that must not be in it."""
    for name in [name for name in masks if name.startswith("context")]:
        context, target = masks[name][row], masks[name.replace("context", "target")][row]
        if context.ndim == 2:
            yield from zip(context.tolist(), target.tolist(), strict=True)
        else:
            yield context.tolist(), target.ravel().tolist()


KINDS = {
    "blocks": ("ijepa", {}),
    "random": ("mae", {}),
    "disjoint": ("dmjd", {}),
    "clip": ("vjepa", {"video_mask": VideoMaskConfig()}),
    "tube": ("videomae", {"video_mask": VideoMaskConfig(kind="tube", tube_ratio=0.7)}),
}


@pytest.mark.parametrize(
    ("fit", "exclude"), [("squash", HUD), ("whole", HUD), ("whole", ()), ("crop", LOWER_HALF)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_lists_have_tokens_that_the_sample_keeps_and_are_disjoint(
    kind: str, fit: Fit, exclude: tuple[Region, ...]
) -> None:
    name, changes = KINDS[kind]
    cfg = config(name, fit, exclude, **changes)
    masker = make_masker(cfg)
    masker.check()
    keys, _, layout = samples(cfg, 2000 if kind == "blocks" else 400)
    masks = masker.for_samples(keys, layout)
    kept = layout.kept_ids(cfg.model.grid.tubes)
    for row, allowed in enumerate(kept):
        for context, target in pairs(masks, row):
            assert context == sorted(context)
            assert not set(context) & set(target)
            assert set(context) | set(target) <= set(allowed.tolist())
    some = np.random.default_rng(0).permutation(len(keys))[:40]
    for ids_name, ids in masker.for_samples(keys[some], layout[some]).items():
        np.testing.assert_array_equal(ids, masks[ids_name][some])


@pytest.mark.parametrize("kind", ["blocks", "clip"])
def test_most_regions_need_no_repeated_tokens(kind: str) -> None:
    name, changes = KINDS[kind]
    for fit in ("squash", "whole"):
        cfg = config(name, fit, **changes)
        keys, _, layout = samples(cfg, 400)
        for ids in make_masker(cfg).for_samples(keys, layout).values():
            assert (np.diff(ids, axis=-1) > 0).all()


def test_single_patches_are_repeated_only_where_the_sample_has_too_few() -> None:
    cfg = config("mae", "whole")
    keys, _, layout = samples(cfg, 400)
    masks = make_masker(cfg).for_samples(keys, layout)
    lists = [masks["context_ids"], masks["target_ids"][:, 0]]
    needed = sum(ids.shape[1] for ids in lists)
    short = layout.counts_B < needed
    assert 0 < short.mean() < 0.15
    repeats = np.array([(np.diff(ids) == 0).any(1) for ids in lists]).any(0)
    np.testing.assert_array_equal(repeats, short)


def test_every_kept_token_is_seen_and_predicted_and_the_mirrored_side_too() -> None:
    """The panel at the right is at the left where the picture is flipped."""
    uncropped = DataConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    cfg = config("ijepa", exclude=((0.7, 0, 1, 1),), data=uncropped)
    keys, flipped, layout = samples(cfg, 2000)
    masks = make_masker(cfg).for_samples(keys, layout)
    for mirrored, columns in ((False, range(11)), (True, range(5, 16))):
        expected = {16 * row + column for row in range(9) for column in columns}
        for ids in masks.values():
            assert set(ids[flipped == mirrored].ravel().tolist()) == expected


def test_numbers_are_those_of_each_ones_own_grid() -> None:
    blocks = VideoMaskConfig(blocks=(2,), scale=(0.3,), temporal_scale=(1.0,))
    cfg = config("vjepa", "whole", (), video_mask=blocks)
    keys, _, layout = samples(cfg, 2000)
    masks = make_masker(cfg).for_samples(keys, layout)
    grids = np.unique(layout.grids_B2, axis=0)
    assert len(grids) > 5
    for grid in grids.tolist():
        mine = (layout.grids_B2 == grid).all(1)
        if mine.sum() >= 40:
            seen = np.unique(np.concatenate([ids[mine].ravel() for ids in masks.values()]))
            one_step = np.arange(grid[0] * grid[1])  # as far apart as on a grid of 144
            assert seen.tolist() == [*one_step, *(one_step + 144)]


def test_a_tube_hides_the_same_patches_at_all_times() -> None:
    cfg = config("videomae", "whole", **KINDS["tube"][1])
    keys, _, layout = samples(cfg, 40)
    for ids in make_masker(cfg).for_samples(keys, layout).values():
        first, second = np.split(ids, TUBES, axis=1)
        np.testing.assert_array_equal(first + 144, second)


def test_targets_stay_blocks() -> None:
    cfg = config("ijepa", exclude=LOWER_HALF)
    keys, _, layout = samples(cfg, 400)
    target = make_masker(cfg).for_samples(keys, layout)["target_ids"]
    box = (np.ptp(target // 16, axis=2) + 1) * (np.ptp(target % 16, axis=2) + 1)
    assert box.max() <= 29  # a fifth of the grid


# --- the last resort


def test_a_sample_with_too_few_tokens_divides_them_in_proportion() -> None:
    counts, visible = np.array([2, 3, 8, 40, 40, 40]), np.array([0, 3, 1, 0, 12, 40])
    assert _divide(counts, visible, (10, 20)).tolist() == [1, 1, 3, 10, 12, 20]


@pytest.mark.parametrize("count", [2, 3, 10, 26, 40])
def test_blocks_that_never_suffice(count: int) -> None:
    cfg = config("ijepa")
    keys = sample_keys([i.to_bytes(16, "little") for i in range(20)], 0, 0)
    kept = np.zeros((20, 144), np.bool_)
    kept[:, 40 : 40 + count] = True
    context, target = _multiblock(keys, cfg.model.grid, kept, MaskConfig(), (12, 14))
    assert (context.shape, target.shape) == ((20, 12), (20, 4, 14))
    for row in range(20):
        seen, hidden = set(context[row].tolist()), set(target[row].ravel().tolist())
        assert not seen & hidden
        assert seen | hidden <= set(range(40, 40 + count))
        if count >= 26:
            assert (np.diff(context[row]) > 0).all()
            assert (np.diff(target[row]) > 0).all()
        else:
            assert len(seen | hidden) == count


def test_repeating_begins_where_a_random_subset_ends() -> None:
    keys = sample_keys([i.to_bytes(16, "little") for i in range(50)], 0, 0)
    allowed = np.random.default_rng(0).random((50, 30)) < 0.6
    np.testing.assert_array_equal(
        repeated_subset(keys, allowed, 6, 16), random_subset(keys, allowed, 6, 16)
    )
    allowed[:, 4:] = False
    allowed[:, 0] = True
    for row, ids in zip(allowed, repeated_subset(keys, allowed, 9, 16), strict=True):
        times = np.bincount(ids, minlength=30)[row]
        assert times.sum() == 9
        assert times.max() - times.min() <= 1


def test_a_crop_inside_a_region_becomes_all_that_is_shown() -> None:
    small = DataConfig(crop_scale=(0.05, 0.1))
    cfg = config("ijepa", exclude=LOWER_HALF, data=small)
    keys = sample_keys([i.to_bytes(16, "little") for i in range(400)], 0, 0)
    sizes = np.tile(np.array([[360, 640]], np.int32), (400, 1))
    boxes, layout = draw_crops(keys, sizes, np.zeros(400, np.bool_), cfg.model, small)
    assert layout is not None
    whole = (boxes == [0, 0, 640, 360]).all(1)
    assert 0.3 < whole.mean() < 0.7
    assert (boxes[~whole, 1] < 180).all()
    assert layout.counts_B.min() >= 144 / 3
    # Control: as drawn, nearly half of the crops lie wholly in the lower half.
    drawn = fitted_crops(keys, sizes, cfg.model, small)
    assert np.mean(drawn[:, 1] >= 180) > 0.3


# --- what is refused


@pytest.mark.parametrize("name", ["ijepa", "mae", "dmjd", "vjepa", "lejepa"])
def test_regions_that_leave_nothing_are_refused(name: str) -> None:
    cfg = config(name, exclude=((0, 0, 1, 0.99),))
    with pytest.raises(ValueError, match=r"--model\.exclude"):
        make_masker(cfg).check()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ijepa", {"mask": MaskConfig(truncate="legacy")}, "--mask.truncate legacy.*exclude"),
        ("vjepa", {"video_mask": VideoMaskConfig(truncate="legacy")}, "--video-mask.truncate"),
        ("ijepa", {"mask": MaskConfig(context_keep=110)}, "--mask.context-keep: most samples"),
        ("dmjd", {"mask": MaskConfig(context_keep=100)}, "--mask.context-keep"),
        ("mae", {"mask": MaskConfig(hidden=0.99)}, "--model.exclude.*1 context tokens"),
    ],
)
def test_impossible_settings_name_the_flag(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_masker(config(name, **changes)).check()


def test_legacy_masks_do_not_follow_grids_of_their_own() -> None:
    cfg = config("ijepa", "whole", (), mask=MaskConfig(truncate="legacy"))
    with pytest.raises(ValueError, match=r"--mask.truncate legacy.*--model.fit whole"):
        make_masker(cfg).check()


def test_a_masker_of_whole_grids_takes_no_layout() -> None:
    cfg = config("ijepa")
    keys, _, layout = samples(cfg, 4)
    with pytest.raises(ValueError, match="samples that lack tokens"):
        MultiblockMasker(cfg.model.grid, cfg.mask).for_samples(keys, layout)
