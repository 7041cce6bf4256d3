"""Finds a worker that is slower than the others, from step times gathered where metrics are read.

In the backward pass all workers wait for the slowest one, so that their steps take equally long.
What tells them apart is the time that each of them waits for data and the time of its forward pass.
Objectives that compare rows of all workers wait for one another in the forward pass too; of those,
only a worker that waits for data is found.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FACTOR = 1.5
"""How many times as long as the others' median a worker takes before it counts as slow."""
LEAST_SHARE = 0.1
"""Share of a step that it has to cost before it counts."""
PATIENCE = 3
"""Number of consecutive readings that a worker is named after, if they span `PATIENCE_S` too."""
PATIENCE_S = 30.0
"""Seconds. Where readings follow one another at once, any other work on a host looks like this."""
WAIT_SHARE = 0.5
"""Share of a step above which waiting for data is told."""
WAIT_PATIENCE = 5
"""Number of consecutive readings until it is told; the first ones of a run always wait."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long the parts of a step took one worker, on average since the last reading."""

    host: str
    """Address and name of its host."""
    data_s: float
    """Waiting for data."""
    forward_s: float
    """Forward pass."""
    step_s: float
    """The whole step."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    """A worker that is slower than the others."""

    rank: int
    what: str
    mine_s: float
    others_s: float


def slowest(paces: Sequence[Pace]) -> tuple[float, Slow | None]:
    """Compares workers.

    Args:
        paces: By rank; two or more.

    Returns:
        The share of a step for which the others wait for the slowest worker, about; and the worker
        that is slow, if one is.
    """
    found: list[tuple[float, Slow]] = []
    for rank, pace in enumerate(paces):
        others = [other for index, other in enumerate(paces) if index != rank]
        for what, mine, theirs in (
            ("waiting for data", pace.data_s, [other.data_s for other in others]),
            ("forward pass", pace.forward_s, [other.forward_s for other in others]),
        ):
            median = statistics.median(theirs)
            share = (mine - median) / pace.step_s if pace.step_s else 0.0
            found.append((share, Slow(rank=rank, what=what, mine_s=mine, others_s=median)))
    share, worst = max(found, key=lambda item: item[0])
    slow = share >= LEAST_SHARE and worst.mine_s >= FACTOR * worst.others_s
    return max(0.0, share), worst if slow else None


class Hunger:
    """Says once that all workers wait for data for much of their time."""

    def __init__(self) -> None:
        self._strikes = 0

    def read(self, data_wait_share: float, crowd: Callable[[], str] | None) -> str | None:
        """Takes one reading.

        Args:
            data_wait_share: Share of a step for which this worker waits for data.
            crowd: Says what others hold of the cluster; None if that is not known.

        Returns:
            A line for the user, or None.
        """
        if not data_wait_share >= WAIT_SHARE:
            self._strikes = 0
            return None
        self._strikes += 1
        if self._strikes != WAIT_PATIENCE:
            return None
        others = f"; {crowd()}" if crowd else ""
        return (
            f"WARNING: training waits for data {data_wait_share:.0%} of the time{others}. Give it "
            "more CPUs, see --data.decode-in and --data.decode-threads"
        )


class Stragglers:
    """Names a worker that is slow at several readings in a row, once until that changes.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[int, str] | None = None
        self._since, self._strikes, self._named = 0.0, 0, False

    def read(self, paces: Sequence[Pace]) -> tuple[dict[str, float], str | None]:
        """Takes one reading of all workers.

        Returns:
            The metric `straggler_share`, and a line for the user or None.
        """
        if len(paces) < 2:
            return {}, None
        share, slow = slowest(paces)
        self._count((slow.rank, slow.what) if slow else None)
        lasted = self._clock() - self._since
        if not slow or self._named or self._strikes < PATIENCE or lasted < PATIENCE_S:
            return {"straggler_share": share}, None
        self._named = True
        return {"straggler_share": share}, (
            f"WARNING: worker {slow.rank} on {paces[slow.rank].host} is slower than the others "
            f"since {lasted:.0f} s: {slow.what} takes it {slow.mine_s:.3g} s a step, them "
            f"{slow.others_s:.3g} s"
        )

    def _count(self, now: tuple[int, str] | None) -> None:
        if now is None or now != self._last:
            self._since, self._strikes, self._named = self._clock(), 0, False
        self._last = now
        self._strikes += 1
