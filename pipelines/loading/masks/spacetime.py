"""V-JEPA's masks of clips as a function of (seed, epoch, sample id); numpy only.

Every generator draws some blocks and hides their union; the rest is context. Block shapes are those
of `pipelines.loading.masks.multiblock`. Tokens are numbered by time, then row, then column.

Shape suffixes: B clips, M blocks of a generator, K kept context tokens, T kept target tokens,
S time steps, P patches of a time step, N = S * P.

These masks differ from the original's, which `legacy_video_masks` reproduces: every clip and block
has its own shape, and lists that are too long lose a random part instead of the end of the clip.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.image_size import Grid
from models.keyed_random.arrays import U64, bits, key_of, mix, uniforms
from models.keyed_random.streams import ClipMaskStream, LegacyClipMaskStream, SampleStream
from pipelines.config.data import VideoMaskConfig
from pipelines.loading.masks.multiblock import (
    ATTEMPTS,
    CALIBRATION_DRAWS,
    I32,
    Bools,
    Shapes,
    block_shapes,
    cover_blocks,
    place_blocks,
)

MISSES = 0.05
"""Share of first draws that may have too few context tokens; the same for target tokens."""

Masks = tuple[I32, I32]


class Generator(Protocol):
    """A way of hiding part of a clip."""

    def hidden(self, keys_B: U64, attempt: int) -> Bools:
        """Draws the hidden tokens of every clip, [B, N]."""


@dataclass(frozen=True)
class Blocks:
    """Hides the union of `count` blocks, which may lie at any place and time of the grid."""

    grid: Grid
    count: int
    shapes: Shapes
    lasts: int
    """Number of time steps of a block."""

    def hidden(self, keys_B: U64, attempt: int) -> Bools:
        """Draws the hidden tokens of every clip, [B, N]."""
        draws_BM4 = uniforms(keys_B, ClipMaskStream.ATTEMPTS.at(2 * attempt), 4 * self.count)
        draws_BM4 = draws_BM4.reshape(-1, self.count, 4)
        blocks_BM4 = place_blocks(draws_BM4[..., :3], self.grid, self.shapes)
        start_BM = (draws_BM4[..., 3] * (self.grid.tubes + 1 - self.lasts)).astype(np.int64)
        since_BMS = np.arange(self.grid.tubes) - start_BM[..., None]
        during_BMS = (since_BMS >= 0) & (since_BMS < self.lasts)
        hidden_BSP = np.zeros((len(keys_B), self.grid.tubes, self.grid.per_step), np.bool_)
        for m in range(self.count):
            covered_BP = cover_blocks(blocks_BM4[:, m : m + 1], self.grid)
            hidden_BSP |= during_BMS[:, m, :, None] & covered_BP[:, None]
        return hidden_BSP.reshape(len(keys_B), -1)


@dataclass(frozen=True)
class Tube:
    """Hides the same random patches in all time steps."""

    grid: Grid
    patches: int
    """Number of hidden patches in a time step."""

    def hidden(self, keys_B: U64, attempt: int) -> Bools:
        """Draws the hidden tokens of every clip, [B, N]."""
        draws_BP = uniforms(keys_B, ClipMaskStream.ATTEMPTS.at(2 * attempt), self.grid.per_step)
        rank_BP = draws_BP.argsort(1).argsort(1)
        return np.tile(rank_BP < self.patches, (1, self.grid.tubes))


def make_generators(grid: Grid, cfg: VideoMaskConfig) -> list[Generator]:
    """Makes the generators that `cfg` asks for.

    Raises:
        ValueError: the tube ratio leaves nothing to see or nothing to predict.
    """
    if cfg.kind == "tube":
        return [Tube(grid, _hidden_patches(grid, cfg))]
    return [
        Blocks(grid, count, block_shapes(grid, (scale, scale), cfg.ratio), lasts)
        for count, scale, lasts in _block_settings(grid.tubes, cfg)
    ]


def _block_settings(steps: int, cfg: VideoMaskConfig) -> list[tuple[int, float, int]]:
    """Returns (number of blocks, their scale, their time steps) of every generator."""
    settings = zip(cfg.blocks, cfg.scale, cfg.temporal_scale, strict=True)
    return [(count, scale, max(1, round(share * steps))) for count, scale, share in settings]


def _hidden_patches(grid: Grid, cfg: VideoMaskConfig) -> int:
    hidden = round(cfg.tube_ratio * grid.rows * grid.columns)
    if not 0 < hidden < grid.per_step:
        raise ValueError(
            f"--video-mask.tube-ratio: {cfg.tube_ratio} of {grid.per_step} patches leaves none to "
            "see or none to predict"
        )
    return hidden


@functools.lru_cache(maxsize=64)
def video_mask_lengths(grid: Grid, cfg: VideoMaskConfig) -> tuple[tuple[int, int], ...]:
    """Returns (K, T) of every generator: the context and target tokens kept, fixed for a run.

    These are the lengths that all but MISSES of first draws reach; the others are drawn again.
    Draws that leave no context, which occur on small grids, do not count.

    Args:
        grid: the tokens of a clip.
        cfg: the mask settings.

    Raises:
        ValueError: masks are `legacy` (their lengths change with the batch), or the settings leave
            no context or no target.
    """
    if cfg.truncate == "legacy":
        raise ValueError(
            "--video-mask.truncate legacy has no fixed lengths: every batch has others"
        )
    generators = make_generators(grid, cfg)
    return tuple(_lengths(generator, g) for g, generator in enumerate(generators))


def _lengths(generator: Generator, g: int) -> tuple[int, int]:
    keys_B = generator_keys(mix(np.arange(CALIBRATION_DRAWS, dtype=np.uint64)), g)
    hidden_BN = generator.hidden(keys_B, attempt=0)
    count, hidden_B = hidden_BN.shape[1], np.sort(hidden_BN.sum(1))
    hidden_B = hidden_B[hidden_B < count]
    if len(hidden_B) < 0.25 * CALIBRATION_DRAWS:
        raise ValueError(
            f"--video-mask.scale: generator {g} mostly hides all {count} tokens of a clip; fewer "
            "or smaller --video-mask.blocks, or a smaller --model.patch-size"
        )
    rank = int(MISSES * len(hidden_B))
    keep, hide = count - int(hidden_B[-1 - rank]), int(hidden_B[rank])
    return keep, hide


def generator_keys(keys_B: U64, g: int) -> U64:
    """Returns the keys of generator `g`, independent of the other generators and of the crop."""
    return mix(keys_B ^ key_of(SampleStream.CLIP_MASK, g))


def video_masks(keys_B: U64, grid: Grid, cfg: VideoMaskConfig) -> list[Masks]:
    """Draws context and target token ids of every clip: ascending, of fixed length, disjoint.

    Lists longer than `video_mask_lengths` are cut to a random subset. A clip whose blocks leave too
    few tokens is drawn again, at most ATTEMPTS times. After that (1e-24 of the clips), tokens of
    the other list fill the gap.

    Args:
        keys_B: `keyed_random.arrays.sample_keys`.
        grid: the tokens of a clip.
        cfg: the mask settings; `truncate` must be `random`.

    Returns:
        For every generator, context ids int32 [B, K] and target ids int32 [B, T].
    """
    lengths = video_mask_lengths(grid, cfg)
    generators = make_generators(grid, cfg)
    return [
        _masks(generator, generator_keys(keys_B, g), *lengths[g])
        for g, generator in enumerate(generators)
    ]


def _masks(generator: Generator, keys_B: U64, keep_K: int, keep_T: int) -> Masks:
    context_BK = np.empty((len(keys_B), keep_K), np.int32)
    target_BT = np.empty((len(keys_B), keep_T), np.int32)
    rows = np.arange(len(keys_B))
    for attempt in range(ATTEMPTS + 1):
        keys = keys_B[rows]
        hidden_BN = generator.hidden(keys, attempt)
        hidden_B, count = hidden_BN.sum(1), hidden_BN.shape[1]
        done = (hidden_B >= keep_T) & (count - hidden_B >= keep_K) | (attempt == ATTEMPTS)
        order_BN = random_order(keys[done], hidden_BN[done], attempt)
        context_BK[rows[done]] = np.sort(order_BN[:, :keep_K], axis=1)
        target_BT[rows[done]] = np.sort(order_BN[:, count - keep_T :], axis=1)
        rows = rows[~done]
        if not len(rows):
            break
    return context_BK, target_BT


def random_order(keys_B: U64, hidden_BN: Bools, attempt: int) -> I32:
    """Returns token ids in random order, all visible ones before all hidden ones, [B, N]."""
    count = hidden_BN.shape[1]
    low_bits = np.uint64((count - 1).bit_length())
    order_BN = bits(keys_B, ClipMaskStream.ATTEMPTS.at(2 * attempt + 1), count)
    # From the highest bit: whether it is hidden, random bits, and the token's number.
    order_BN = order_BN >> np.uint64(1) >> low_bits << low_bits
    order_BN |= hidden_BN.astype(np.uint64) << np.uint64(63) | np.arange(count, dtype=np.uint64)
    order_BN.sort(axis=1)
    return (order_BN & ((np.uint64(1) << low_bits) - np.uint64(1))).astype(np.int32)


def legacy_video_masks(key: np.uint64, batch: int, grid: Grid, cfg: VideoMaskConfig) -> list[Masks]:
    """Draws masks with the statistics of the original V-JEPA collator, for a whole global batch.

    A generator has one block size in a batch, whose sides are cut to the grid's. All lists are cut
    to the batch's shortest, at the end of the clip. A clip without context is drawn again.

    Args:
        key: `key_of(seed, epoch, batch index)`.
        batch: clips in the global batch.
        grid: the tokens of a clip.
        cfg: the mask settings.

    Returns:
        For every generator, context ids int32 [B, K] and target ids int32 [B, T] of this batch.

    Raises:
        ValueError: the blocks hide everything, however often they are drawn.
    """
    masks = []
    for g, generator in enumerate(_legacy_generators(key, grid, cfg)):
        batch_key = generator_keys(np.array([key], np.uint64), g)
        keys_B = bits(batch_key, LegacyClipMaskStream.CLIPS, batch)[0]
        hidden_BN = _legacy_hidden(generator, keys_B)
        keep_T, keep_K = int(hidden_BN.sum(1).min()), int((~hidden_BN).sum(1).min())
        visible_first_BN = np.argsort(hidden_BN, axis=1, kind="stable")
        hidden_first_BN = np.argsort(~hidden_BN, axis=1, kind="stable")
        context_BK, target_BT = visible_first_BN[:, :keep_K], hidden_first_BN[:, :keep_T]
        masks.append((context_BK.astype(np.int32), target_BT.astype(np.int32)))
    return masks


def _legacy_generators(key: np.uint64, grid: Grid, cfg: VideoMaskConfig) -> list[Generator]:
    if cfg.kind == "tube":
        return make_generators(grid, cfg)
    generators: list[Generator] = []
    for g, (count, scale, lasts) in enumerate(_block_settings(grid.tubes, cfg)):
        batch_key = generator_keys(np.array([key], np.uint64), g)
        draw = uniforms(batch_key, LegacyClipMaskStream.ASPECT, 1)
        aspect = cfg.ratio[0] + (cfg.ratio[1] - cfg.ratio[0]) * draw[0, 0]
        area = int(scale * grid.per_step)
        height, width = (
            max(1, min(side, round((area * r) ** 0.5)))
            for side, r in ((grid.rows, aspect), (grid.columns, 1 / aspect))
        )
        generators.append(Blocks(grid, count, (((height, width),), (1.0,)), lasts))
    return generators


def _legacy_hidden(generator: Generator, keys_B: U64) -> Bools:
    """Returns the hidden tokens before truncation, [B, N]."""
    hidden_BN = generator.hidden(keys_B, attempt=0)
    for attempt in range(1, ATTEMPTS):
        full = hidden_BN.all(1)
        if not full.any():
            return hidden_BN
        hidden_BN[full] = generator.hidden(keys_B[full], attempt)
    raise ValueError("--video-mask.scale: the blocks hide whole clips; fewer or smaller ones")
