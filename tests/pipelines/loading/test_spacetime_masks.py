"""Masks of clips: our contract, and the original's statistics in `legacy` mode.

B clips, K context tokens, T target tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from models.image_size import Grid
from models.keyed_random.arrays import key_of, sample_keys
from pipelines.config.data import VideoMaskConfig
from pipelines.loading.masks.maskers import ClipMasker
from pipelines.loading.masks.spacetime import legacy_video_masks, video_mask_lengths, video_masks

CLIP = Grid(14, 14, 8)
DEFAULT = VideoMaskConfig()
LEGACY = VideoMaskConfig(truncate="legacy")
TUBE = VideoMaskConfig(kind="tube")
SHORT_LASTING = VideoMaskConfig(blocks=(6,), scale=(0.3,), temporal_scale=(0.5,))


def keys(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    ids = [i.to_bytes(16, "big") for i in range(count)]
    return sample_keys(ids, seed, epoch)


def counts(masks: list, steps: int, grid: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """How often each token is context and target, by generator, as [steps, grid, grid]."""
    shape = (steps, grid, grid)
    return [
        tuple(np.bincount(ids.reshape(-1), minlength=np.prod(shape)).reshape(shape) for ids in pair)
        for pair in masks
    ]


@pytest.mark.parametrize("cfg", [DEFAULT, TUBE, SHORT_LASTING])
@pytest.mark.parametrize(("steps", "grid"), [(8, 14), (4, 8), (4, 4), (1, 8)])
def test_masks_are_ascending_disjoint_and_of_fixed_length(
    cfg: VideoMaskConfig, steps: int, grid: int
) -> None:
    lengths = video_mask_lengths(Grid(grid, grid, steps), cfg)
    masks = video_masks(keys(300), Grid(grid, grid, steps), cfg)
    assert len(masks) == len(lengths) == cfg.generators
    for (context, target), (keep, hide) in zip(masks, lengths, strict=True):
        assert context.shape == (300, keep)
        assert target.shape == (300, hide)
        both = np.concatenate([context, target], 1)
        assert both.min() >= 0
        assert both.max() < steps * grid * grid
        assert all(len(set(row)) == keep + hide for row in both)
        assert (np.diff(context, axis=1) > 0).all()
        assert (np.diff(target, axis=1) > 0).all()


@pytest.mark.parametrize("cfg", [DEFAULT, TUBE, SHORT_LASTING])
def test_every_row_column_and_time_step_is_seen_and_predicted(cfg: VideoMaskConfig) -> None:
    for context, target in counts(video_masks(keys(1000), CLIP, cfg), 8, 14):
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            assert (context.sum(others) > 0).all()
            assert (target.sum(others) > 0).all()


def test_the_end_of_the_clip_counts_as_much_as_its_beginning_but_not_in_legacy_mode() -> None:
    """Blocks last the whole clip, so only truncation can treat times differently."""
    for context, target in counts(video_masks(keys(1000), CLIP, DEFAULT), 8, 14):
        for times in (context.sum((1, 2)), target.sum((1, 2))):
            assert times.max() / times.min() < 1.05
    drawn = [legacy_video_masks(key_of(i), 24, CLIP, LEGACY) for i in range(20)]
    for g in range(2):
        context = sum(counts(masks, 8, 14)[g][0] for masks in drawn).sum((1, 2))
        assert context[-1] < 0.2 * context[0]


def test_a_tube_hides_the_same_patches_at_all_times() -> None:
    ((context, target),) = video_masks(keys(50), CLIP, TUBE)
    assert target.shape[1] == 8 * round(0.9 * 196)
    for ids in (context, target):
        by_time = ids.reshape(50, 8, -1)
        assert (by_time // 196 == np.arange(8)[:, None]).all()
        assert (by_time % 196 == by_time[:, :1] % 196).all()
    assert len({tuple(row) for row in context}) == 50


def test_targets_are_blocks_and_the_long_range_hides_more() -> None:
    (short, _), (long, _) = video_mask_lengths(CLIP, DEFAULT)
    assert 0.2 < short / 1568 < 0.35  # of a mean of 0.37: what 95% of the draws reach
    assert 0.04 < long / 1568 < 0.1


def test_a_short_block_lasts_its_share_of_the_clip() -> None:
    cfg = VideoMaskConfig(blocks=(1,), scale=(0.3,), temporal_scale=(0.25,))
    ((_, target),) = video_masks(keys(200), CLIP, cfg)
    times = target // 196
    assert ((times.max(1) - times.min(1)) <= 1).all()
    assert set(times.reshape(-1)) == set(range(8))


def test_masks_follow_the_sample_the_seed_and_the_epoch_and_nothing_else() -> None:
    whole = video_masks(keys(100), CLIP, DEFAULT)
    some = video_masks(keys(100)[[70, 3]], CLIP, DEFAULT)
    for (a, b), (c, d) in zip(whole, some, strict=True):
        assert (a[[70, 3]] == c).all()
        assert (b[[70, 3]] == d).all()
    for other in (keys(100, seed=1), keys(100, epoch=1)):
        assert (video_masks(other, CLIP, DEFAULT)[0][0] != whole[0][0]).any(1).all()


def test_the_generators_of_a_clip_are_independent() -> None:
    twice = VideoMaskConfig(blocks=(8, 8), scale=(0.15, 0.15))
    (first, _), (second, _) = video_masks(keys(50), CLIP, twice)
    width = min(first.shape[1], second.shape[1])  # calibrated each on its own draws
    assert (first[:, :width] != second[:, :width]).any(1).all()


def test_frozen_values() -> None:
    """These values must not change, or a resumed run would see other masks."""
    (context, target), (context_1, _) = video_masks(keys(3), Grid(8, 8, 4), DEFAULT)
    assert (context.shape, target.shape, context_1.shape) == FROZEN_SHAPES
    assert context[2, :6].tolist() == FROZEN_CONTEXT
    assert target[1, -4:].tolist() == FROZEN_TARGET


FROZEN_SHAPES = ((3, 60), (3, 128), (3, 8))
FROZEN_CONTEXT = [0, 1, 5, 6, 7, 23]
FROZEN_TARGET = [228, 232, 233, 234]


def test_legacy_reproduces_the_published_statistics() -> None:
    """A simulation of the original collator with 8x14x14 tokens and 24 clips a batch gave mean
    contexts of 582 tokens, 359 after truncation, at short range, and of 290 and 93 at long
    range."""
    drawn = [legacy_video_masks(key_of(1, i), 24, CLIP, LEGACY) for i in range(100)]
    for g, (context, target, tolerance) in enumerate(((359, 752, 20), (93, 1101, 20))):
        kept = [(masks[g][0].shape[1], masks[g][1].shape[1]) for masks in drawn]
        assert np.mean([k for k, _ in kept]) == pytest.approx(context, abs=tolerance)
        assert np.mean([t for _, t in kept]) == pytest.approx(target, abs=tolerance)


def test_legacy_masks_are_prefixes_of_one_block_size() -> None:
    for context, target in legacy_video_masks(key_of(3), 16, CLIP, LEGACY):
        assert not set(context[0]) & set(target[0])
        assert (np.diff(context, axis=1) > 0).all()
        assert context[:, 0].max() < 196  # the first visible patch of the first time step
    again = legacy_video_masks(key_of(3), 16, CLIP, LEGACY)[1][0]
    assert (again == legacy_video_masks(key_of(3), 16, CLIP, LEGACY)[1][0]).all()


def test_impossible_settings_name_their_flag() -> None:
    with pytest.raises(ValueError, match=r"--video-mask\.scale"):
        video_mask_lengths(
            Grid(4, 4, 4), VideoMaskConfig(blocks=(8,), scale=(0.9,), temporal_scale=(1.0,))
        )
    with pytest.raises(ValueError, match=r"--video-mask\.tube-ratio"):
        video_mask_lengths(Grid(2, 2, 4), VideoMaskConfig(kind="tube", tube_ratio=0.95))
    with pytest.raises(ValueError, match=r"--video-mask\.truncate"):
        video_mask_lengths(CLIP, LEGACY)
    with pytest.raises(ValueError, match=r"--video-mask\.scale"):
        VideoMaskConfig(blocks=(8, 2), scale=(0.15,))
    full = dataclasses.replace(LEGACY, blocks=(4,), scale=(1.0,), temporal_scale=(1.0,))
    with pytest.raises(ValueError, match=r"--video-mask\.scale"):
        legacy_video_masks(key_of(0), 4, Grid(4, 4, 4), full)


def test_a_batch_knows_its_masks_by_name() -> None:
    masker = ClipMasker(Grid(8, 8, 4), DEFAULT)
    names = ["context_ids_0", "target_ids_0", "context_ids_1", "target_ids_1"]
    assert list(masker.for_samples(keys(4))) == names
    assert list(ClipMasker(Grid(8, 8, 4), LEGACY).for_batch(key_of(0), 4)) == names
