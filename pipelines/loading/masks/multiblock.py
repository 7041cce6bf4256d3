"""I-JEPA's multi-block masks as a function of (seed, epoch, sample id); numpy only.

Shape suffixes: B samples, M target blocks an image, K kept context tokens, T kept tokens of one
target block, P positions inside the largest block, G rows (= columns) of the patch grid, N = G * G,
C draws a sample.

These masks differ from the original's, which `legacy_masks` reproduces: scale and ratio are drawn
independently, every sample and block has its own shape, positions reach the last row and column,
and lists that are too long lose a random part instead of the bottom of the image.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

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


@functools.lru_cache(maxsize=64)
def block_shapes(grid: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Shapes:
    """Returns the block shapes that can be drawn on this grid, and the probability of each.

    Scale and ratio are independent and uniform, height = round(sqrt(area * ratio)) and width =
    round(sqrt(area / ratio)). Shapes whose area is outside `scale` by more than one token are left
    out (rounding both sides can leave the range by far more). The probabilities are integrated
    numerically, so that one uniform number draws a shape.

    Returns:
        ((height, width), ...) sorted by area, and probabilities that sum to 1.
    """
    middles = (np.arange(256) + 0.5) / 256
    area = (scale[0] + (scale[1] - scale[0]) * middles)[:, None] * grid * grid
    aspect = ratio[0] + (ratio[1] - ratio[0]) * middles[None, :]
    height = np.clip(np.rint(np.sqrt(area * aspect)), 1, grid).astype(np.int64)
    width = np.clip(np.rint(np.sqrt(area / aspect)), 1, grid).astype(np.int64)
    low, high = np.floor(scale[0] * grid * grid), np.ceil(scale[1] * grid * grid)
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
def mask_lengths(grid: int, cfg: MaskConfig) -> tuple[int, int]:
    """Returns (K, T): the tokens kept of every context and of every target block, fixed for a run.

    T is the area of the smallest block that can be drawn, so that every block has that many. K is
    `cfg.context_keep` if given. Otherwise it is 16 tokens of 8x8, 40 of 12x12, 64 of 14x14, 88 of
    16x16 and in proportion for other grids, provided that 90% of first draws have that many (the
    rest are drawn again); if not, it is the length that 90% reach.

    Raises:
        ValueError: masks are `legacy` (their lengths change with the batch), the grid is smaller
            than 2x2, or `context_keep` cannot be met.
    """
    if cfg.truncate == "legacy":
        raise ValueError("--mask.truncate legacy has no fixed lengths: they differ in every batch")
    if grid < 2:
        raise ValueError(
            f"--model.patch-size: a {grid}x{grid} patch grid leaves no room for context and targets"
        )
    shapes, _ = block_shapes(grid, cfg.target_scale, cfg.target_ratio)
    kept_T = shapes[0][0] * shapes[0][1]
    most = grid * grid - kept_T
    if most < 1:
        raise ValueError(f"--mask.target-scale: targets cover the whole {grid}x{grid} grid")
    if cfg.context_keep is None:
        usual = min(_usual_context(grid), _reachable_context(grid, cfg))
        return min(max(1, usual), most), kept_T
    if cfg.context_keep > most:
        raise ValueError(
            f"--mask.context-keep: at most {most} of {grid * grid} tokens are left beside a target"
            f" block of {kept_T}, got {cfg.context_keep}"
        )
    return cfg.context_keep, kept_T


def _usual_context(grid: int) -> int:
    """Returns a context length that suits the default blocks; a multiple of 8 on larger grids."""
    if grid < 8:
        return round(0.3 * grid * grid)
    share = 0.25 + 0.094 * min(grid - 8, 8) / 8
    return round(share * grid * grid / 8) * 8


def _reachable_context(grid: int, cfg: MaskConfig) -> int:
    """Returns the context length that all but `MOST_MISSES` of first draws reach."""
    keys_B = mix(np.arange(CALIBRATION_DRAWS, dtype=np.uint64))
    allowed_BN = _draw(keys_B, grid, cfg, attempt=0)[0]
    return int(np.sort(allowed_BN.sum(1))[int(MOST_MISSES * CALIBRATION_DRAWS)])


def multiblock_masks(keys_B: U64, grid: int, cfg: MaskConfig) -> tuple[I32, I32]:
    """Draws context and target token ids of every sample: ascending, of fixed length, disjoint.

    The context is a square block minus the union of the target blocks. Lists longer than
    `mask_lengths` are cut to a random subset. A sample with too small a context is drawn again, at
    most ATTEMPTS times, with other numbers in each attempt. After that, which only happens with a
    `context_keep` near the limit, its context may lie anywhere outside its targets; if that is
    still too little, all its targets become the first one. In every case lengths are exact, and
    context and targets are disjoint.

    Args:
        keys_B: `sample_keys`.
        grid: patches on a side.
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
        allowed_BN, free_BN, blocks_BM4 = _draw(keys, grid, cfg, attempt)
        targets = _target_subsets(keys, blocks_BM4, grid, keep_T, attempt)
        if attempt == ATTEMPTS:
            _force(allowed_BN, free_BN, targets, keep_K)
        done = allowed_BN.sum(1) >= keep_K
        picked = _random_subset(
            keys[done], allowed_BN[done], keep_K, SampleStream.MASK.at(3 * attempt + 2)
        )
        context_BK[rows[done]] = picked
        target_BMT[rows[done]] = targets[done]
        rows = rows[~done]
        if not len(rows):
            break
    return context_BK, target_BMT


def _draw(keys_B: U64, grid: int, cfg: MaskConfig, attempt: int) -> tuple[Bools, Bools, I64]:
    """Draws all blocks.

    Returns:
        Tokens that the context may use [B, N], tokens outside all targets [B, N], and target blocks
        [B, M, 4] as (top, left, height, width).
    """
    draws_BMC = uniforms(keys_B, SampleStream.MASK.at(3 * attempt), 3 * (cfg.num_targets + 1))
    draws_BMC = draws_BMC.reshape(len(keys_B), cfg.num_targets + 1, 3)
    target_shapes = block_shapes(grid, cfg.target_scale, cfg.target_ratio)
    context_shapes = block_shapes(grid, cfg.context_scale, (1.0, 1.0))
    targets_BM4 = place_blocks(draws_BMC[:, 1:], grid, target_shapes)
    context_BM4 = place_blocks(draws_BMC[:, :1], grid, context_shapes)
    free_BN = ~cover_blocks(targets_BM4, grid)
    return cover_blocks(context_BM4, grid) & free_BN, free_BN, targets_BM4


def place_blocks(draws_BM3: F64, grid: int, choices: Shapes) -> I64:
    """Makes blocks (top, left, height, width) of three uniforms each; every position can occur."""
    shapes, probabilities = choices
    index_BM = np.searchsorted(np.cumsum(probabilities)[:-1], draws_BM3[..., 0], side="right")
    size_BM2 = np.array(shapes, np.int64)[index_BM]
    corner_BM2 = (draws_BM3[..., 1:] * (grid + 1 - size_BM2)).astype(np.int64)
    return np.concatenate([corner_BM2, size_BM2], -1)


def cover_blocks(blocks_BM4: I64, grid: int) -> Bools:
    """Returns which tokens are inside any of the blocks, [B, N]."""
    line_G = np.arange(grid)
    top, left, height, width = (blocks_BM4[..., i, None] for i in range(4))
    rows_BMG = (line_G >= top) & (line_G < top + height)
    columns_BMG = (line_G >= left) & (line_G < left + width)
    covered_BGG = np.zeros((len(blocks_BM4), grid, grid), np.bool_)
    for m in range(blocks_BM4.shape[1]):
        covered_BGG |= rows_BMG[:, m, :, None] & columns_BMG[:, m, None, :]
    return covered_BGG.reshape(-1, grid * grid)


def _target_subsets(keys_B: U64, blocks_BM4: I64, grid: int, keep_T: int, attempt: int) -> I32:
    """Chooses `keep_T` random tokens of every block, ascending, [B, M, T]."""
    batch, blocks = blocks_BM4.shape[:2]
    flat_4 = blocks_BM4.reshape(-1, 4)
    top, left, height, width = (flat_4[:, i, None] for i in range(4))
    most_P = int((height * width).max(initial=keep_T))
    stream = SampleStream.MASK.at(3 * attempt + 1)
    block_keys = bits(keys_B, stream, blocks).reshape(-1)
    inside = _random_subset(block_keys, np.arange(most_P) < height * width, keep_T, stream)
    ids = (top + inside // width) * grid + left + inside % width
    return ids.astype(np.int32).reshape(batch, blocks, keep_T)


def _random_subset(keys_B: U64, allowed_BN: Bools, keep: int, stream: int) -> I32:
    """Chooses `keep` random positions of each row's allowed ones, ascending, [B, keep]."""
    count = allowed_BN.shape[1]
    low_bits = np.uint32(max(1, (count - 1).bit_length()))
    halves = (count + 1) // 2  # two 32-bit priorities a word; `reshape(-1)` would fail without rows
    words = bits(keys_B, stream, halves).view(np.uint32).reshape(len(keys_B), 2 * halves)
    # The priority is in the high bits and the position in the low bits, so a partition moves both.
    packed_BN = (words[:, :count] >> np.uint32(1) >> low_bits << low_bits) | np.arange(
        count, dtype=np.uint32
    )
    packed_BN[~allowed_BN] |= np.uint32(1 << 31)
    kept = np.partition(packed_BN, keep - 1, axis=1)[:, :keep] if keep < count else packed_BN
    return np.sort(kept & ((np.uint32(1) << low_bits) - np.uint32(1)), axis=1).astype(np.int32)


def _force(allowed_BN: Bools, free_BN: Bools, targets_BMT: I32, keep_K: int) -> None:
    """Changes, in place, the samples that `multiblock_masks` could not satisfy by drawing again."""
    short = allowed_BN.sum(1) < keep_K
    allowed_BN[short] = free_BN[short]
    for row in np.flatnonzero(allowed_BN.sum(1) < keep_K):
        targets_BMT[row] = targets_BMT[row, 0]
        allowed_BN[row] = True
        allowed_BN[row, targets_BMT[row, 0]] = False


def legacy_masks(key: np.uint64, batch: int, grid: int, cfg: MaskConfig) -> tuple[I32, I32]:
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
        grid: patches on a side, at least 2.
        cfg: the mask settings.

    Returns:
        context ids int32 [B, K], target ids int32 [B, M, T]; K and T are this batch's.
    """
    if grid < 2:
        raise ValueError(f"--model.patch-size: legacy masks need a 2x2 grid, got {grid}x{grid}")
    size_keys = np.array([key], np.uint64)
    r_target, r_context = uniforms(size_keys, LegacyBatchStream.SIZES, 2)[0]
    target_hw = _legacy_size(r_target, grid, cfg.target_scale, cfg.target_ratio)
    context_hw = _legacy_size(r_context, grid, cfg.context_scale, (1.0, 1.0))
    keys_B = bits(size_keys, LegacyBatchStream.SAMPLES, batch)[0]
    corners = uniforms(keys_B, LegacyMaskStream.TARGETS, 2 * cfg.num_targets).reshape(batch, -1, 2)
    targets_BM4 = _legacy_place(corners, grid, target_hw)
    allowed_BN = _legacy_context(keys_B, targets_BM4, context_hw, grid)
    tokens_T = np.arange(target_hw[0] * target_hw[1])
    offsets_T = tokens_T // target_hw[1] * grid + tokens_T % target_hw[1]
    target_BMT = (targets_BM4[..., :1] * grid + targets_BM4[..., 1:2] + offsets_T).astype(np.int32)
    keep_K = int(allowed_BN.sum(1).min(initial=grid * grid))
    order_BN = np.argsort(~allowed_BN, axis=1, kind="stable")
    return order_BN[:, :keep_K].astype(np.int32), target_BMT


def _legacy_size(
    r: float, grid: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    area = int(grid * grid * (scale[0] + (scale[1] - scale[0]) * r))
    aspect = ratio[0] + (ratio[1] - ratio[0]) * r
    height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    return max(1, min(height, grid - 1)), max(1, min(width, grid - 1))


def _legacy_place(draws_BM2: F64, grid: int, size_hw: tuple[int, int]) -> I64:
    size_2 = np.array(size_hw, np.int64)
    corner_BM2 = (draws_BM2 * (grid - size_2)).astype(np.int64)
    return np.concatenate([corner_BM2, np.broadcast_to(size_2, corner_BM2.shape)], -1)


def _legacy_context(keys_B: U64, targets_BM4: I64, size_hw: tuple[int, int], grid: int) -> Bools:
    """Returns the context tokens before truncation, [B, N]."""
    min_keep = min(10, grid * grid // 16)
    allowed_BN = np.zeros((len(keys_B), grid * grid), np.bool_)
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
