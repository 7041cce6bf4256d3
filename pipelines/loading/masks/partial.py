"""Masks of samples that lack tokens or have grids of their own; numpy only.

They are drawn as on whole grids, once for every grid that occurs, but no list has a token that its
sample lacks. The lengths of lists are fixed for a run: most samples of `calibration_layout` reach
them. The others are drawn again where that may help. In the last resort, a sample with too few
tokens repeats those that it has: such a token counts more than once. Context and targets are
disjoint in every case.

Shape suffixes: B samples, N tokens of a sample's grid, P patches of a time step, M target blocks, C
contexts, K context tokens, T target tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from models.image_size import Grid
from models.keyed_random.arrays import I64, U64, bits
from models.keyed_random.streams import ClipMaskStream, SampleStream
from pipelines.config.data import MaskConfig, VideoMaskConfig
from pipelines.loading.masks.layouts import CropSettings, Layout, calibration_layout
from pipelines.loading.masks.multiblock import (
    ATTEMPTS,
    I32,
    MOST_MISSES,
    Bools,
    cover_blocks,
    draw_blocks,
    repeated_subset,
    usual_context,
)
from pipelines.loading.masks.spacetime import (
    MISSES,
    Generator,
    Masks,
    generator_keys,
    make_generators,
    random_order,
)

Lengths = tuple[int, int]
"""K and T of a run."""


def check_lengths(keep_K: int, keep_T: int) -> Lengths:
    """Returns the lengths.

    Raises:
        ValueError: there is no room for two context tokens and one target token.
    """
    if keep_K < 2 or keep_T < 1:
        raise ValueError(
            f"--model.exclude: the regions leave room for {keep_K} context tokens and {keep_T} "
            "target tokens; leave out less, or draw larger crops (--data.crop-scale)"
        )
    return keep_K, keep_T


@functools.lru_cache(maxsize=8)
def reached_patches(crops: CropSettings) -> int:
    """Returns how many patches of a time step all but `MOST_MISSES` of the samples keep."""
    return _reached(calibration_layout(crops)[1].counts_B, MOST_MISSES)


def _reached(counts: I64, misses: float) -> int:
    """Returns the number that all but a share `misses` of the counts reach."""
    return int(np.sort(counts, axis=None)[int(misses * counts.size)])


def _draw_by_grid(
    keys_B: U64,
    layout: Layout,
    tubes: int,
    shapes: Sequence[tuple[int, ...]],
    draw: Callable[[U64, Grid, Bools], Sequence[I32]],
) -> list[I32]:
    """Draws arrays of the given shapes, [B, ...], by `draw` for the samples of every grid.

    Returns:
        Token numbers as in `Layout.kept_ids`: time steps are as far apart as on the largest grid.
    """
    drawn = [np.empty((len(keys_B), *shape), np.int32) for shape in shapes]
    for grid, samples, kept_BP in layout.by_grid(tubes):
        for whole, part in zip(drawn, draw(keys_B[samples], grid, kept_BP), strict=True):
            gap = layout.kept_BN.shape[1] - grid.per_step
            whole[samples] = part + gap * (part // grid.per_step)
    return drawn


# --- I-JEPA's blocks


@functools.lru_cache(maxsize=8)
def partial_block_lengths(cfg: MaskConfig, crops: CropSettings) -> Lengths:
    """Returns the lengths K of contexts and T of target blocks.

    All but `MOST_MISSES` of first draws have at least as many tokens; blocks of which no token is
    left do not count. K is `cfg.context_keep`, if given, and otherwise no more than on the
    encoder's whole grid.

    Raises:
        ValueError: too few tokens are left; the flag is named.
    """
    keys_B, layout = calibration_layout(crops)
    contexts, targets = [], []
    for grid, samples, kept_BN in layout.by_grid():
        context_BN, inside_BMN = _kept_draw(keys_B[samples], grid, kept_BN, cfg, attempt=0)
        contexts.append((context_BN & ~inside_BMN.any(1)).sum(1))
        targets.append(inside_BMN.sum(2).reshape(-1))
    sizes = np.concatenate(targets)
    keep_T = _reached(sizes[sizes > 0], MOST_MISSES)
    keep_K = min(
        _reached(np.concatenate(contexts), MOST_MISSES), max(2, usual_context(crops.model.grid))
    )
    check_lengths(keep_K, keep_T)
    if cfg.context_keep is None:
        return keep_K, keep_T
    if cfg.context_keep > reached_patches(crops) - keep_T:
        raise ValueError(
            f"--mask.context-keep: most samples keep {reached_patches(crops)} tokens, of which "
            f"{keep_T} are a target block; {cfg.context_keep} is more than the rest"
        )
    return cfg.context_keep, keep_T


def partial_multiblock_masks(
    keys_B: U64, layout: Layout, cfg: MaskConfig, lengths: Lengths
) -> list[I32]:
    """Draws context and target tokens of images, see `multiblock.multiblock_masks`.

    Blocks with too few tokens are drawn again, and so is a sample whose blocks have enough but
    whose context has too few; both at most ATTEMPTS times. After that, all targets of the sample
    become its fullest block, and its context may lie anywhere outside that.

    Args:
        keys_B: `sample_keys`.
        layout: the tokens of the samples.
        cfg: the mask settings.
        lengths: `partial_block_lengths`.

    Returns:
        Context ids int32 [B, K] and target ids int32 [B, M, T], ascending.
    """
    shapes = ((lengths[0],), (cfg.num_targets, lengths[1]))

    def draw(keys_B: U64, grid: Grid, kept_BN: Bools) -> tuple[I32, I32]:
        return _multiblock(keys_B, grid, kept_BN, cfg, lengths)

    return _draw_by_grid(keys_B, layout, 1, shapes, draw)


def _multiblock(
    keys_B: U64, grid: Grid, kept_BN: Bools, cfg: MaskConfig, lengths: Lengths
) -> tuple[I32, I32]:
    keep_K, keep_T = lengths
    context_BK = np.empty((len(keys_B), keep_K), np.int32)
    target_BMT = np.empty((len(keys_B), cfg.num_targets, keep_T), np.int32)
    inside_BMN = np.zeros((len(keys_B), cfg.num_targets, grid.per_step), np.bool_)
    rows = np.arange(len(keys_B))
    for attempt in range(ATTEMPTS + 1):
        context_BN, drawn_BMN = _kept_draw(keys_B[rows], grid, kept_BN[rows], cfg, attempt)
        full_BM = inside_BMN.sum(2) >= keep_T
        stays_BM = full_BM & ~full_BM.all(1, keepdims=True)
        inside_BMN = np.where(stays_BM[..., None], inside_BMN, drawn_BMN)
        allowed_BN = context_BN & ~inside_BMN.any(1)
        done = (allowed_BN.sum(1) >= keep_K) & (inside_BMN.sum(2) >= keep_T).all(1)
        if attempt == ATTEMPTS:
            for row in np.flatnonzero(~done):
                fullest_N = _one_block(kept_BN[rows[row]], inside_BMN[row], lengths)
                inside_BMN[row], allowed_BN[row] = fullest_N, kept_BN[rows[row]] & ~fullest_N
            done[:] = True
        streams = [SampleStream.MASK.at(3 * attempt + i) for i in (1, 2)]
        keys, inside = keys_B[rows[done]], inside_BMN[done].reshape(-1, grid.per_step)
        block_keys = bits(keys, streams[0], cfg.num_targets).reshape(-1)
        targets = repeated_subset(block_keys, inside, keep_T, streams[0])
        target_BMT[rows[done]] = targets.reshape(len(keys), cfg.num_targets, keep_T)
        context_BK[rows[done]] = repeated_subset(keys, allowed_BN[done], keep_K, streams[1])
        rows, inside_BMN = rows[~done], inside_BMN[~done]
        if not len(rows):
            break
    return context_BK, target_BMT


def _kept_draw(
    keys_B: U64, grid: Grid, kept_BN: Bools, cfg: MaskConfig, attempt: int
) -> tuple[Bools, Bools]:
    """Draws the kept tokens in the context blocks, [B, N], and in the targets', [B, M, N]."""
    context_BN, blocks_BM4 = draw_blocks(keys_B, grid, cfg, attempt)
    inside_BMN = cover_blocks(blocks_BM4.reshape(-1, 1, 4), grid).reshape(
        len(keys_B), cfg.num_targets, grid.per_step
    )
    return context_BN & kept_BN, inside_BMN & kept_BN[:, None]


def _one_block(kept_N: Bools, inside_MN: Bools, lengths: Lengths) -> Bools:
    """Returns the fullest block of a sample, made larger or smaller so that both lists are full.

    If its tokens do not suffice for both, they are divided in proportion.
    """
    fullest_N = inside_MN[inside_MN.sum(1).argmax()]
    count = int(kept_N.sum())
    most = count - _divide(np.array([count]), 0, lengths)[0]
    size = min(max(int(fullest_N.sum()), min(lengths[1], most)), most)
    ids = np.flatnonzero(kept_N)
    chosen_N = np.zeros_like(kept_N)
    chosen_N[ids[np.argsort(~fullest_N[ids], kind="stable")[:size]]] = True
    return chosen_N


# --- lists that are taken from one order of a sample's tokens


def _divide(counts_B: I64, visible_B: I64 | int, lengths: Lengths) -> I64:
    """Returns how many of a sample's tokens, the first in its order, are for the context.

    That is the number of its visible ones, unless one of the lists would be too short. Samples with
    fewer than K + T tokens divide these in proportion.
    """
    keep_K, keep_T = lengths
    share_B = np.rint(counts_B * (keep_K / (keep_K + keep_T))).astype(np.int64)
    divided_B = np.clip(share_B, 1, counts_B - 1)
    enough_B = np.clip(visible_B, keep_K, np.maximum(counts_B - keep_T, keep_K))
    return np.where(counts_B >= keep_K + keep_T, enough_B, divided_B)


def _take(order_BN: I32, start_B: I64 | int, stop_B: I64, length: int) -> I32:
    """Takes places [start, stop) of every order, repeated if these are fewer; ascending."""
    start_B1 = np.broadcast_to(start_B, stop_B.shape)[:, None]
    places = start_B1 + np.arange(length) % (stop_B[:, None] - start_B1)
    return np.sort(np.take_along_axis(order_BN, places, 1), axis=1)


def _kept_first(keys_B: U64, kept_BN: Bools, stream: int) -> I32:
    """Draws a random order of every sample's tokens; those that it lacks come last."""
    order_BN = bits(keys_B, stream, kept_BN.shape[1]) >> np.uint64(1)
    order_BN |= (~kept_BN).astype(np.uint64) << np.uint64(63)
    return np.argsort(order_BN, axis=1).astype(np.int32)


def _two_lists(keys_B: U64, kept_BN: Bools, stream: int, lengths: Lengths) -> tuple[I32, I32]:
    """Draws random context tokens [B, K] and random target tokens [B, T]."""
    order_BN, counts_B = _kept_first(keys_B, kept_BN, stream), kept_BN.sum(1)
    middle_B = _divide(counts_B, lengths[0], lengths)
    context_BK = _take(order_BN, 0, middle_B, lengths[0])
    return context_BK, _take(order_BN, middle_B, counts_B, lengths[1])


# --- single patches


def partial_random_masks(keys_B: U64, layout: Layout, lengths: Lengths) -> list[I32]:
    """Draws random context tokens [B, K] and target tokens [B, T], int32, ascending."""

    def draw(keys_B: U64, grid: Grid, kept_BN: Bools) -> tuple[I32, I32]:
        return _two_lists(keys_B, kept_BN, SampleStream.PATCHES, lengths)

    return _draw_by_grid(keys_B, layout, 1, [(length,) for length in lengths], draw)


def partial_disjoint_masks(
    keys_B: U64, layout: Layout, contexts: int, lengths: Lengths
) -> list[I32]:
    """Draws masks as `patches.disjoint_masks` does: [B, C, K] and [B, C, T], int32, ascending.

    If a sample keeps fewer than C tokens, some of its contexts have the same targets.
    """
    keep_K, keep_T = lengths

    def draw(keys_B: U64, grid: Grid, kept_BN: Bools) -> tuple[I32, I32]:
        order_BN = _kept_first(keys_B, kept_BN, SampleStream.PATCHES)
        counts_B1 = kept_BN.sum(1)[:, None]
        each_B1 = np.clip(counts_B1 // contexts, 1, keep_T)
        lists = [np.empty((len(keys_B), contexts, length), np.int32) for length in lengths]
        for c in range(contexts):
            target_BT = c * each_B1 + np.arange(keep_T) % each_B1
            context_BK = (c + 1) * each_B1 + np.arange(keep_K) % (counts_B1 - each_B1)
            for ids, places in zip(lists, (context_BK, target_BT), strict=True):
                ids[:, c] = np.sort(np.take_along_axis(order_BN, places % counts_B1, 1), axis=1)
        return lists[0], lists[1]

    shapes = [(contexts, length) for length in lengths]
    return _draw_by_grid(keys_B, layout, 1, shapes, draw)


# --- clips


@functools.lru_cache(maxsize=8)
def partial_clip_lengths(cfg: VideoMaskConfig, crops: CropSettings) -> tuple[Lengths, ...]:
    """Returns (K, T) of every generator, see `spacetime.video_mask_lengths`.

    Raises:
        ValueError: too few tokens are left; the flag is named.
    """
    tubes = crops.model.grid.tubes
    if cfg.kind == "tube":
        count = reached_patches(crops)
        hidden = round(cfg.tube_ratio * count)
        return (check_lengths(tubes * (count - hidden), tubes * hidden),)
    return tuple(_generator_lengths(cfg, crops, g) for g in range(cfg.generators))


def _generator_lengths(cfg: VideoMaskConfig, crops: CropSettings, g: int) -> Lengths:
    keys_B, layout = calibration_layout(crops)
    tubes = crops.model.grid.tubes
    pairs = []
    for grid, samples, kept_BP in layout.by_grid(tubes):
        hidden_BN = make_generators(grid, cfg)[g].hidden(generator_keys(keys_B[samples], g), 0)
        kept_BN = np.tile(kept_BP, (1, tubes))
        pairs += [(kept_BN & ~hidden_BN).sum(1), (kept_BN & hidden_BN).sum(1)]
    visible_B, hidden_B = np.concatenate(pairs[::2]), np.concatenate(pairs[1::2])
    some_B = visible_B > 0
    if some_B.sum() < 0.25 * len(keys_B):
        raise ValueError(
            f"--video-mask.scale: generator {g} mostly hides all tokens that --model.exclude keeps;"
            " fewer or smaller --video-mask.blocks, or leave out less"
        )
    return check_lengths(*(_reached(counts[some_B], MISSES) for counts in (visible_B, hidden_B)))


def partial_video_masks(
    keys_B: U64, layout: Layout, cfg: VideoMaskConfig, tubes: int, lengths: tuple[Lengths, ...]
) -> list[Masks]:
    """Draws context and target tokens of clips, see `spacetime.video_masks`.

    A clip with too few of either is drawn again, at most ATTEMPTS times. After that, tokens of the
    other list fill the gap.

    Args:
        keys_B: `sample_keys`.
        layout: the tokens of the samples.
        cfg: the mask settings.
        tubes: time steps of a clip.
        lengths: `partial_clip_lengths`.

    Returns:
        For every generator, context ids int32 [B, K] and target ids int32 [B, T].
    """
    masks = []
    for g, pair in enumerate(lengths):

        def draw(
            keys_B: U64, grid: Grid, kept_BP: Bools, g: int = g, pair: Lengths = pair
        ) -> tuple[I32, I32]:
            keys_B = generator_keys(keys_B, g)
            if cfg.kind == "tube":
                return _tube(keys_B, grid, kept_BP, pair)
            kept_BN = np.tile(kept_BP, (1, tubes))
            return _hidden_blocks(make_generators(grid, cfg)[g], keys_B, kept_BN, pair)

        context_BK, target_BT = _draw_by_grid(keys_B, layout, tubes, [(n,) for n in pair], draw)
        masks.append((context_BK, target_BT))
    return masks


def _tube(keys_B: U64, grid: Grid, kept_BP: Bools, lengths: Lengths) -> tuple[I32, I32]:
    """Draws patches, and takes them at all times."""
    patches = (lengths[0] // grid.tubes, lengths[1] // grid.tubes)
    parts = _two_lists(keys_B, kept_BP, ClipMaskStream.ATTEMPTS.at(0), patches)
    starts = grid.per_step * np.arange(grid.tubes, dtype=np.int32)[:, None]
    context_BK, target_BT = ((p[:, None] + starts).reshape(len(keys_B), -1) for p in parts)
    return context_BK, target_BT


def _hidden_blocks(
    generator: Generator, keys_B: U64, kept_BN: Bools, lengths: Lengths
) -> tuple[I32, I32]:
    keep_K, keep_T = lengths
    context_BK = np.empty((len(keys_B), keep_K), np.int32)
    target_BT = np.empty((len(keys_B), keep_T), np.int32)
    counts_B, rows = kept_BN.sum(1), np.arange(len(keys_B))
    for attempt in range(ATTEMPTS + 1):
        hidden_BN, kept = generator.hidden(keys_B[rows], attempt), kept_BN[rows]
        visible_B, hidden_B = (kept & ~hidden_BN).sum(1), (kept & hidden_BN).sum(1)
        done = (visible_B >= keep_K) & (hidden_B >= keep_T) | (attempt == ATTEMPTS)
        ready = rows[done]
        order_BN = _visible_first(keys_B[ready], kept[done], hidden_BN[done], attempt)
        middle_B = _divide(counts_B[ready], visible_B[done], lengths)
        context_BK[ready] = _take(order_BN, 0, middle_B, keep_K)
        target_BT[ready] = _take(order_BN, middle_B, counts_B[ready], keep_T)
        rows = rows[~done]
        if not len(rows):
            break
    return context_BK, target_BT


def _visible_first(keys_B: U64, kept_BN: Bools, hidden_BN: Bools, attempt: int) -> I32:
    """Returns the tokens in random order: visible ones, hidden ones, those that a clip lacks."""
    order_BN = random_order(keys_B, hidden_BN, attempt)
    lacking_BN = ~np.take_along_axis(kept_BN, order_BN, 1)
    return np.take_along_axis(order_BN, np.argsort(lacking_BN, axis=1, kind="stable"), 1)
