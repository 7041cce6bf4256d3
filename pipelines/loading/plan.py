"""The read order: which rows make up a batch, by manifest, settings, seed and epoch.

A global batch has L lanes of b rows. In every epoch the row groups are permuted and laid end to
end. Each lane owns an equal, contiguous part of that sequence and shuffles it in windows. Batch g
takes rows [g*b, (g+1)*b) of every lane. Rank r of W reads the lanes [r*L/W, (r+1)*L/W), which are
one contiguous part of the global batch. So the order does not depend on W, every rank reads only
its own row groups, and the position in the data is one integer, the step. Rows that do not fill a
batch (fewer than L * (b + 1)) are left out for the epoch; other rows are left out in the next.

Only the process of a rank orders all row groups. Its read tasks get a part of the plan (`part_of`),
because at 10^7 row groups the whole would take each task longer than reading
(benchmarks/data/plan_scale.md).

Shape suffixes: G row groups, N rows, 3 = (shard, row group, row) or (shard, row group, rows in it).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.keyed_random.arrays import I64, key_of, permutation
from models.keyed_random.streams import PlanStream
from pipelines.config.data import DataConfig

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class GroupSequence:
    """Row groups in the order of an epoch: all of them, or those that some pieces read."""

    groups_G3: I32
    """(shard, row group, number of rows)."""
    ends_G: I64
    """Where each one ends in the epoch's sequence of rows."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The read order of a whole run; made by `make_plan`."""

    groups_G3: I32
    """(shard, row group, number of rows) of every row group, in the manifest's order; none in a
    part of a plan."""
    rows: int
    """Number of rows in all row groups."""
    seed: int
    batch_size: int
    lanes: int
    window_batches: int
    """Number of batches in one shuffled window of a lane."""
    known: Mapping[int, GroupSequence] | None = None
    """In a part of a plan: the row groups of its pieces, by epoch."""

    @property
    def lane_batch(self) -> int:
        """Number of rows that one lane contributes to a global batch."""
        return self.batch_size // self.lanes

    @property
    def lane_rows(self) -> int:
        """Number of rows of one lane in an epoch, including those that are left out."""
        return self.rows // self.lanes

    @property
    def batches_per_epoch(self) -> int:
        """Number of steps in one epoch."""
        return self.lane_rows // self.lane_batch

    def locate(self, step: int) -> tuple[int, int]:
        """Returns (epoch, batch in the epoch) of a step."""
        return divmod(step, self.batches_per_epoch)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive batches of one window: the work of one read task."""

    epoch: int
    window: int
    start: int
    """First batch, counted from the start of the epoch."""
    stop: int
    """One past the last batch."""
    step: int
    """Step of the first batch."""


def make_plan(
    row_groups: Sequence[tuple[int, int, int]] | I32, data: DataConfig, seed: int
) -> Plan:
    """Makes the read order of a run.

    Args:
        row_groups: (shard, row group, rows), from `Manifest.row_groups`; or as an array,
            `Manifest.row_group_array`.
        data: batch size, lanes and shuffle window.
        seed: the run's seed.

    Raises:
        ValueError: there are fewer rows than a batch needs.
    """
    groups_G3 = np.asarray(row_groups, np.int32).reshape(-1, 3)
    plan = Plan(
        groups_G3=groups_G3,
        rows=int(groups_G3[:, 2].sum(dtype=np.int64)),
        seed=seed,
        batch_size=data.batch_size,
        lanes=data.lanes,
        window_batches=max(1, data.shuffle_window * data.lanes // data.batch_size),
    )
    if plan.batches_per_epoch < 1:
        raise ValueError(
            f"--data.batch-size: {data.batch_size} is more than the {plan.rows} samples"
        )
    return plan


def rank_lanes(plan: Plan, rank: int, world_size: int) -> range:
    """Returns the lanes that a rank reads.

    Raises:
        ValueError: the lanes cannot be divided evenly among the ranks.
    """
    if plan.lanes % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"--run.workers: rank {rank} of {world_size} workers cannot share {plan.lanes} lanes"
        )
    share = plan.lanes // world_size
    return range(rank * share, (rank + 1) * share)


def iter_pieces(
    plan: Plan, start_step: int, end_step: int, most_batches: int | None = None
) -> Iterator[Piece]:
    """Cuts the steps [start_step, end_step) at window and epoch boundaries.

    Args:
        plan: the plan.
        start_step: first step, inclusive.
        end_step: last step, exclusive.
        most_batches: cut windows further, so that no piece has more batches than this. It does
            not change which rows make up a batch.
    """
    cuts = -(-plan.window_batches // (most_batches or plan.window_batches))
    size = -(-plan.window_batches // cuts)
    step = start_step
    while step < end_step:
        epoch, batch = plan.locate(step)
        window, inside = divmod(batch, plan.window_batches)
        stop = min(batch - inside % size + size, (window + 1) * plan.window_batches)
        stop = min(stop, plan.batches_per_epoch, batch + end_step - step)
        yield Piece(epoch=epoch, window=window, start=batch, stop=stop, step=step)
        step += stop - batch


def pieces(
    plan: Plan, start_step: int, end_step: int, most_batches: int | None = None
) -> list[Piece]:
    """Returns all of `iter_pieces`."""
    return list(iter_pieces(plan, start_step, end_step, most_batches))


def part_of(plan: Plan, pieces: Iterable[Piece], lanes: range) -> Plan:
    """Returns the plan with only those row groups that some pieces read; their rows are the same.

    Args:
        plan: the plan of the run.
        pieces: from `pieces`, in their order.
        lanes: the lanes whose rows are read.
    """
    known = {}
    for epoch, of_epoch in itertools.groupby(pieces, key=lambda piece: piece.epoch):
        windows = [piece.window for piece in of_epoch]
        known[epoch] = _groups_of(plan, epoch, range(windows[0], windows[-1] + 1), lanes)
    return dataclasses.replace(plan, groups_G3=np.empty((0, 3), np.int32), known=known)


def _groups_of(plan: Plan, epoch: int, windows: range, lanes: range) -> GroupSequence:
    """Returns the row groups in which rows of these windows stand."""
    sequence = _epoch_groups(plan, epoch)
    window_rows = plan.window_batches * plan.lane_batch
    first = windows.start * window_rows
    last = min(windows.stop * window_rows, plan.lane_rows) - 1
    starts_L = np.array(lanes, np.int64) * plan.lane_rows
    low_L = np.searchsorted(sequence.ends_G, starts_L + first, side="right")
    high_L = np.searchsorted(sequence.ends_G, starts_L + last, side="right")
    spans = [np.arange(low, high + 1) for low, high in zip(low_L, high_L, strict=True)]
    which_G = np.unique(np.concatenate(spans))  # a group may stand across two lanes
    return GroupSequence(sequence.groups_G3[which_G], sequence.ends_G[which_G])


def lane_windows(plan: Plan, piece: Piece, lanes: range) -> I64:
    """Returns the rows that these lanes contribute to the piece's batches, in batch order.

    Args:
        plan: the plan.
        piece: from `pieces`.
        lanes: from `rank_lanes`; all lanes give the global batches.

    Returns:
        int64 [N, 3] of (shard, row group, row in the group), N = batches x lanes x lane batch. The
        batch varies slowest, then the lane.
    """
    rows = np.stack([_lane_rows(plan, piece, lane) for lane in lanes])
    batches = piece.stop - piece.start
    by_lane = rows.reshape(len(lanes), batches, plan.lane_batch)
    return _locate_rows(plan, piece.epoch, by_lane.transpose(1, 0, 2).reshape(-1))


def _lane_rows(plan: Plan, piece: Piece, lane: int) -> I64:
    """Returns where one lane's rows of the piece stand in the epoch's sequence."""
    first = piece.window * plan.window_batches * plan.lane_batch
    size = min(plan.window_batches * plan.lane_batch, plan.lane_rows - first)
    order = permutation(key_of(plan.seed, PlanStream.ROWS, piece.epoch, lane, piece.window), size)
    skip = piece.start * plan.lane_batch - first
    taken = order[skip : skip + (piece.stop - piece.start) * plan.lane_batch]
    return lane * plan.lane_rows + first + taken


def _locate_rows(plan: Plan, epoch: int, places_N: I64) -> I64:
    """Turns places in the epoch's sequence into (shard, row group, row)."""
    sequence = _epoch_groups(plan, epoch) if plan.known is None else plan.known[epoch]
    which_N = np.searchsorted(sequence.ends_G, places_N, side="right")
    groups_N3 = sequence.groups_G3[which_N]
    row_N = places_N - (sequence.ends_G[which_N] - groups_N3[:, 2])
    assert (row_N >= 0).all(), "the rows are outside this part of the plan"
    return np.column_stack([groups_N3[:, :2], row_N])


@functools.lru_cache(maxsize=2)
def _epoch_groups(plan: Plan, epoch: int) -> GroupSequence:
    """Returns all row groups in the order of the epoch."""
    order = permutation(key_of(plan.seed, PlanStream.GROUPS, epoch), len(plan.groups_G3))
    groups_G3 = plan.groups_G3[order]
    return GroupSequence(groups_G3, np.cumsum(groups_G3[:, 2], dtype=np.int64))
