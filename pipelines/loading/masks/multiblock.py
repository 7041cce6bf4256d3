"""I-JEPA's multi-block masks as a function of (seed, epoch, sample id); numpy only.

Shape suffixes: B samples, M target blocks an image, K kept context tokens, T kept tokens of one
target block, P positions inside the largest block, G rows and H columns of the patch grid, N = G *
H, C draws a sample, 4 = (top, left, height, width), 2 = (height, width) or (top, left).

These masks differ from the original's, which `legacy_masks` reproduces: scale and ratio are drawn
independently, every sample and block has its own shape, positions reach the last row and column,
and lists that are too long lose a random part instead of the bottom of the image.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from models.image_size import Grid
from models.keyed_random.arrays import F64, I64, U64, bits, mix, uniforms
from models.keyed_random.streams import LegacyBatchStream, LegacyMaskStream, SampleStream
from pipelines.config.data import MaskConfig

I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Shapes = tuple[tuple[tuple[int, int], ...], tuple[float, ...]]
"""(height, width) of every shape, and their probabilities."""

ATTEMPTS = 24
"""Redraws of a sample with too small a context. With 10% misses, 1e-24 of samples use all."""
CALIBRATION_DRAWS = 2048
"""Samples that are drawn to find the context length."""
MOST_MISSES = 0.1
"""Share of first draws that may have too small a context."""


@functools.lru_cache(maxsize=1024)
def block_shapes(grid: Grid, scale: tuple[float, float], ratio: tuple[float, float]) -> Shapes:
    """Returns the block shapes that can be drawn on this grid, and the probability of each.

    Scale and ratio are independent and uniform, height = round(sqrt(area * ratio)) and width =
    round(sqrt(area / ratio)), so a block of ratio 1 has as many rows as columns on every grid. No
    side is longer than that of a square grid of as many tokens. On a grid that is not square, a
    height beyond its rows is cut to them, and the width grows so that the area stays the same;
    likewise a width beyond its columns. Shapes whose area is outside `scale` by more than one token
    are left out (rounding both sides can leave the range by far more). The probabilities are
    integrated numerically, so that one uniform number draws a shape.

    Args:
        grid: the token grid, whose time steps do not matter.
        scale: range of the area, as a fraction of the tokens of one time step.
        ratio: range of height by width, in tokens.

    Returns:
        ((height, width), ...) sorted by area, and probabilities that sum to 1.
    """
    rows, columns = grid.rows, grid.columns
    middles = (np.arange(256) + 0.5) / 256
    area = (scale[0] + (scale[1] - scale[0]) * middles)[:, None] * rows * columns
    aspect = ratio[0] + (ratio[1] - ratio[0]) * middles[None, :]
    side = math.sqrt(rows * columns)
    tall, wide = (np.minimum(np.sqrt(a), side) for a in (area * aspect, area / aspect))
    fitted_tall = np.where(wide > columns, tall * wide / columns, np.minimum(tall, rows))
    fitted_wide = np.where(tall > rows, tall * wide / rows, np.minimum(wide, columns))
    height, width = (np.maximum(np.rint(x), 1).astype(np.int64) for x in (fitted_tall, fitted_wide))
    low, high = np.floor(scale[0] * rows * columns), np.ceil(scale[1] * rows * columns)
    legal = (height * width >= low) & (height * width <= high)
    if (
        not legal.any()
    ):  # the range is so narrow, or the grid so small, that rounding always leaves it
        legal[:] = True
    found, counts = np.unique(
        np.stack([height[legal] * width[legal], height[legal], width[legal]], 1),
        axis=0,
        return_counts=True,
    )
    shapes = tuple((int(h), int(w)) for _, h, w in found)
    return shapes, tuple(float(c) for c in counts / counts.sum())


@functools.lru_cache(maxsize=64)
def mask_lengths(grid: Grid, cfg: MaskConfig) -> tuple[int, int]:
    """Returns (K, T): the tokens kept of every context and of every target block, fixed for a run.

    T is the area of the smallest block that can be drawn, so that every block has that many. K is
    `cfg.context_keep` if given. Otherwise it is 16 tokens of 8x8, 40 of 12x12, 64 of 14x14, 88 of
    16x16 and in proportion for other grids, provided that 90% of first draws have that many (the
    rest are drawn again); if not, it is the length that 90% reach.

    Raises:
        ValueError: masks are `legacy` (their lengths change with the batch), the grid has fewer
            than 4 tokens, or `context_keep` cannot be met.
    """
    if cfg.truncate == "legacy":
        raise ValueError("--mask.truncate legacy has no fixed lengths: they differ in every batch")
    tokens, size = grid.per_step, f"{grid.rows}x{grid.columns}"
    if tokens < 4:
        raise ValueError(
            f"--model.patch-size: a {size} patch grid leaves no room for context and targets"
        )
    shapes, _ = block_shapes(grid, cfg.target_scale, cfg.target_ratio)
    kept_T = shapes[0][0] * shapes[0][1]
    most = tokens - kept_T
    if most < 1:
        raise ValueError(f"--mask.target-scale: targets cover the whole {size} grid")
    if cfg.context_keep is None:
        usual = min(usual_context(grid), _reachable_context(grid, cfg))
        return min(max(1, usual), most), kept_T
    if cfg.context_keep > most:
        raise ValueError(
            f"--mask.context-keep: at most {most} of {tokens} tokens are left beside a target"
            f" block of {kept_T}, got {cfg.context_keep}"
        )
    return cfg.context_keep, kept_T


def usual_context(grid: Grid) -> int:
    """Returns a context length that suits the default blocks; a multiple of 8 on larger grids."""
    tokens = grid.per_step
    side = math.sqrt(tokens)
    if side < 8:
        return round(0.3 * tokens)
    share = 0.25 + 0.094 * min(side - 8, 8) / 8
    return round(share * tokens / 8) * 8


def _reachable_context(grid: Grid, cfg: MaskConfig) -> int:
    """Returns the context length that all but `MOST_MISSES` of first draws reach."""
    keys_B = mix(np.arange(CALIBRATION_DRAWS, dtype=np.uint64))
    inside_BN, blocks_BM4 = draw_blocks(keys_B, grid, cfg, attempt=0)
    allowed_BN = inside_BN & ~cover_blocks(blocks_BM4, grid)
    return int(np.sort(allowed_BN.sum(1))[int(MOST_MISSES * CALIBRATION_DRAWS)])


def multiblock_masks(keys_B: U64, grid: Grid, cfg: MaskConfig) -> tuple[I32, I32]:
    """Draws context and target token ids of every sample: ascending, of fixed length, disjoint.

    The context is a square block minus the union of the target blocks. Lists longer than
    `mask_lengths` are cut to a random subset. A sample with too small a context is drawn again, at
    most ATTEMPTS times, with other numbers in each attempt. After that, which only happens with a
    `context_keep` near the limit, its context may lie anywhere outside its targets; if that is
    still too little, all its targets become the first one. In every case lengths are exact, and
    context and targets are disjoint.

    Args:
        keys_B: `sample_keys`.
        grid: the patches of an image.
        cfg: the mask settings; `truncate` must be `random`.

    Returns:
        context ids int32 [B, K], target ids int32 [B, M, T].
    """
    keep_K, keep_T = mask_lengths(grid, cfg)
    context_BK = np.empty((len(keys_B), keep_K), np.int32)
    target_BMT = np.empty((len(keys_B), cfg.num_targets, keep_T), np.int32)
    rows = np.arange(len(keys_B))
    for attempt in range(ATTEMPTS + 1):
        keys = keys_B[rows]
        inside_BN, blocks_BM4 = draw_blocks(keys, grid, cfg, attempt)
        free_BN = ~cover_blocks(blocks_BM4, grid)
        allowed_BN = inside_BN & free_BN
        targets = _target_subsets(keys, blocks_BM4, grid, keep_T, attempt)
        if attempt == ATTEMPTS:
            _force(allowed_BN, free_BN, targets, keep_K)
        done = allowed_BN.sum(1) >= keep_K
        picked = random_subset(
            keys[done], allowed_BN[done], keep_K, SampleStream.MASK.at(3 * attempt + 2)
        )
        context_BK[rows[done]] = picked
        target_BMT[rows[done]] = targets[done]
        rows = rows[~done]
        if not len(rows):
            break
    return context_BK, target_BMT


def draw_blocks(keys_B: U64, grid: Grid, cfg: MaskConfig, attempt: int) -> tuple[Bools, I64]:
    """Draws all blocks.

    Returns:
        Tokens inside the context block [B, N], and target blocks [B, M, 4].
    """
    draws_BMC = uniforms(keys_B, SampleStream.MASK.at(3 * attempt), 3 * (cfg.num_targets + 1))
    draws_BMC = draws_BMC.reshape(len(keys_B), cfg.num_targets + 1, 3)
    target_shapes = block_shapes(grid, cfg.target_scale, cfg.target_ratio)
    context_shapes = block_shapes(grid, cfg.context_scale, (1.0, 1.0))
    targets_BM4 = place_blocks(draws_BMC[:, 1:], grid, target_shapes)
    context_BM4 = place_blocks(draws_BMC[:, :1], grid, context_shapes)
    return cover_blocks(context_BM4, grid), targets_BM4


def place_blocks(draws_BM3: F64, grid: Grid, choices: Shapes) -> I64:
    """Makes blocks (top, left, height, width) of three uniforms each; every position can occur."""
    shapes, probabilities = choices
    index_BM = np.searchsorted(np.cumsum(probabilities)[:-1], draws_BM3[..., 0], side="right")
    size_BM2 = np.array(shapes, np.int64)[index_BM]
    room_BM2 = np.array([grid.rows + 1, grid.columns + 1]) - size_BM2
    corner_BM2 = (draws_BM3[..., 1:] * room_BM2).astype(np.int64)
    return np.concatenate([corner_BM2, size_BM2], -1)


def cover_blocks(blocks_BM4: I64, grid: Grid) -> Bools:
    """Returns which tokens are inside any of the blocks, [B, N]."""
    row_G, column_H = np.arange(grid.rows), np.arange(grid.columns)
    top, left, height, width = (blocks_BM4[..., i, None] for i in range(4))
    rows_BMG = (row_G >= top) & (row_G < top + height)
    columns_BMH = (column_H >= left) & (column_H < left + width)
    covered_BGH = np.zeros((len(blocks_BM4), grid.rows, grid.columns), np.bool_)
    for m in range(blocks_BM4.shape[1]):
        covered_BGH |= rows_BMG[:, m, :, None] & columns_BMH[:, m, None, :]
    return covered_BGH.reshape(-1, grid.per_step)


def _target_subsets(keys_B: U64, blocks_BM4: I64, grid: Grid, keep_T: int, attempt: int) -> I32:
    """Chooses `keep_T` random tokens of every block, ascending, [B, M, T]."""
    batch, blocks = blocks_BM4.shape[:2]
    flat_4 = blocks_BM4.reshape(-1, 4)
    top, left, height, width = (flat_4[:, i, None] for i in range(4))
    most_P = int((height * width).max(initial=keep_T))
    stream = SampleStream.MASK.at(3 * attempt + 1)
    block_keys = bits(keys_B, stream, blocks).reshape(-1)
    inside = random_subset(block_keys, np.arange(most_P) < height * width, keep_T, stream)
    ids = (top + inside // width) * grid.columns + left + inside % width
    return ids.astype(np.int32).reshape(batch, blocks, keep_T)


def random_subset(keys_B: U64, allowed_BN: Bools, keep: int, stream: int) -> I32:
    """Chooses `keep` random positions of each row's allowed ones, ascending, [B, keep]."""
    packed_BN, place = _random_order(keys_B, allowed_BN, stream)
    kept = packed_BN
    if keep < allowed_BN.shape[1]:
        kept = np.partition(packed_BN, keep - 1, axis=1)[:, :keep]
    return np.sort(kept & place, axis=1).astype(np.int32)


def repeated_subset(keys_B: U64, allowed_BN: Bools, keep: int, stream: int) -> I32:
    """As `random_subset`, but where fewer are allowed, at least one, all of these are repeated."""
    packed_BN, place = _random_order(keys_B, allowed_BN, stream)
    packed_BN.sort(axis=1)
    turns = np.arange(keep) % allowed_BN.sum(1)[:, None]
    return np.sort(np.take_along_axis(packed_BN, turns, 1) & place, axis=1).astype(np.int32)


def _random_order(
    keys_B: U64, allowed_BN: Bools, stream: int
) -> tuple[npt.NDArray[np.uint32], np.uint32]:
    """Draws numbers that sort positions at random, the allowed ones before the others.

    Returns:
        uint32 [B, N], and the mask of the bits that hold the position.
    """
    count = allowed_BN.shape[1]
    low_bits = np.uint32(max(1, (count - 1).bit_length()))
    halves = (count + 1) // 2  # two 32-bit priorities a word; `reshape(-1)` would fail without rows
    words = bits(keys_B, stream, halves).view(np.uint32).reshape(len(keys_B), 2 * halves)
    # The priority is in the high bits and the position in the low bits, so sorting moves both.
    packed_BN = (words[:, :count] >> np.uint32(1) >> low_bits << low_bits) | np.arange(
        count, dtype=np.uint32
    )
    packed_BN[~allowed_BN] |= np.uint32(1 << 31)
    return packed_BN, (np.uint32(1) << low_bits) - np.uint32(1)


def _force(allowed_BN: Bools, free_BN: Bools, targets_BMT: I32, keep_K: int) -> None:
    """Changes, in place, the samples that `multiblock_masks` could not satisfy by drawing again."""
    short = allowed_BN.sum(1) < keep_K
    allowed_BN[short] = free_BN[short]
    for row in np.flatnonzero(allowed_BN.sum(1) < keep_K):
        targets_BMT[row] = targets_BMT[row, 0]
        allowed_BN[row] = True
        allowed_BN[row, targets_BMT[row, 0]] = False


def legacy_masks(key: np.uint64, batch: int, grid: Grid, cfg: MaskConfig) -> tuple[I32, I32]:
    """Draws masks with the statistics of the original I-JEPA collator, for a whole global batch.

    A batch has one target size and one context size, with scale and ratio from one draw. Blocks are
    strictly smaller than the grid and positions have an exclusive bound, so the last row and column
    are never reached. All lists are cut to the batch's shortest in raster order. A context of at
    most `min_keep` tokens is drawn again: 20 times, then 20 times with one target fewer cut out,
    and so on. Unlike the original, which loops forever with blocks of 10 tokens or less, this
    always ends, because targets, whose size is fixed, are not tested for size, and `min_keep` is 10
    or N / 16.

    Args:
        key: `key_of(seed, epoch, batch index)`.
        batch: samples in the global batch.
        grid: the patches of an image, at least two rows and two columns. As in the original, a
            side of a block that is too long is cut, and the other does not grow.
        cfg: the mask settings.

    Returns:
        context ids int32 [B, K], target ids int32 [B, M, T]; K and T are this batch's.
    """
    if min(grid.rows, grid.columns) < 2:
        size = f"{grid.rows}x{grid.columns}"
        raise ValueError(f"--model.patch-size: legacy masks need a 2x2 grid, got {size}")
    size_keys = np.array([key], np.uint64)
    r_target, r_context = uniforms(size_keys, LegacyBatchStream.SIZES, 2)[0]
    target_hw = _legacy_size(r_target, grid, cfg.target_scale, cfg.target_ratio)
    context_hw = _legacy_size(r_context, grid, cfg.context_scale, (1.0, 1.0))
    keys_B = bits(size_keys, LegacyBatchStream.SAMPLES, batch)[0]
    corners = uniforms(keys_B, LegacyMaskStream.TARGETS, 2 * cfg.num_targets).reshape(batch, -1, 2)
    targets_BM4 = _legacy_place(corners, grid, target_hw)
    allowed_BN = _legacy_context(keys_B, targets_BM4, context_hw, grid)
    tokens_T = np.arange(target_hw[0] * target_hw[1])
    columns = grid.columns
    offsets_T = tokens_T // target_hw[1] * columns + tokens_T % target_hw[1]
    corners_BM1 = targets_BM4[..., :1] * columns + targets_BM4[..., 1:2]
    target_BMT = (corners_BM1 + offsets_T).astype(np.int32)
    keep_K = int(allowed_BN.sum(1).min(initial=grid.per_step))
    order_BN = np.argsort(~allowed_BN, axis=1, kind="stable")
    return order_BN[:, :keep_K].astype(np.int32), target_BMT


def _legacy_size(
    r: float, grid: Grid, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    area = int(grid.per_step * (scale[0] + (scale[1] - scale[0]) * r))
    aspect = ratio[0] + (ratio[1] - ratio[0]) * r
    height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    return max(1, min(height, grid.rows - 1)), max(1, min(width, grid.columns - 1))


def _legacy_place(draws_BM2: F64, grid: Grid, size_hw: tuple[int, int]) -> I64:
    size_2 = np.array(size_hw, np.int64)
    room_2 = np.array([grid.rows, grid.columns]) - size_2
    corner_BM2 = (draws_BM2 * room_2).astype(np.int64)
    return np.concatenate([corner_BM2, np.broadcast_to(size_2, corner_BM2.shape)], -1)


def _legacy_context(keys_B: U64, targets_BM4: I64, size_hw: tuple[int, int], grid: Grid) -> Bools:
    """Returns the context tokens before truncation, [B, N]."""
    min_keep = min(10, grid.per_step // 16)
    allowed_BN = np.zeros((len(keys_B), grid.per_step), np.bool_)
    rows = np.arange(len(keys_B))
    for attempt in range(20 * (targets_BM4.shape[1] + 1)):
        corner = uniforms(keys_B[rows], LegacyMaskStream.CONTEXT.at(attempt), 2)[:, None]
        block_BN = cover_blocks(_legacy_place(corner, grid, size_hw), grid)
        cut = targets_BM4.shape[1] - attempt // 20
        allowed_BN[rows] = block_BN & ~cover_blocks(targets_BM4[rows, :cut], grid)
        rows = rows[allowed_BN[rows].sum(1) <= min_keep]
        if not len(rows):
            break
    return allowed_BN
