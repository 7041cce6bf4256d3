"""Says while a run's workers wait for room on the cluster, which Ray Train does in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FIRST_S = 15.0
"""Seconds until the first line; every further one comes after twice the time."""
LONGEST_S = 600.0
"""Seconds between two lines at most."""
EPSILON = 1e-6

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a group of workers needs, and what the cluster has at one moment."""

    workers: int
    """Workers of the group."""
    need: Resources
    """What each of them reserves on one host."""
    hosts: Mapping[str, Resources]
    """What each host has."""
    free: Mapping[str, Resources] = field(default_factory=dict)
    """What of it nobody has reserved."""
    placed: bool = False
    """Whether the group has its room already."""

    @property
    def missing(self) -> int:
        """Workers that do not fit."""
        return 0 if self.placed else max(0, self.workers - sum(map(self._fits, self.hosts)))

    def _fits(self, host: str) -> int:
        free = self.free.get(host, {})
        return int(min((free.get(k, 0.0) + EPSILON) // v for k, v in self.need.items() if v > 0))

    def line(self, waited_s: float) -> str:
        """Says what the group waits for."""
        whose = {1: f"for 1 of {self.workers} workers"} if self.workers > 1 else {1: "for a worker"}
        who = whose.get(self.missing, f"each for {self.missing} of {self.workers} workers")
        able = [h for h, has in self.hosts.items() if all(has.get(name) for name in self.need)]
        there = {name: sum(self.hosts[h][name] for h in able) for name in self.need}
        free = {name: sum(self.free.get(h, {}).get(name, 0.0) for h in able) for name in self.need}
        return (
            f"waiting for {_told(self.need)} on one host {who} ({waited_s:.0f} s): the cluster has "
            f"{_told(there)} on {len(able)} host{'' if len(able) == 1 else 's'}, {_told(free)} free"
        )


def _told(amounts: Resources) -> str:
    """Returns resources in words, as in `3 CPUs and 1 GPU`."""
    parts = [
        f"{amount:g} {name}{'' if amount == 1 or not name.isupper() else 's'}"
        for name, amount in amounts.items()
    ]
    return " and ".join(parts)


class Waiting:
    """Decides when a line about waiting is due."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._next_s = FIRST_S
        self._told = False

    def lines(self, room: Room, now: float) -> list[str]:
        """Returns the line that is due at a moment, in seconds of any clock, if one is."""
        if not room.missing:
            return self._end(now)
        if self._since is None:
            self._since = now
        waited = now - self._since
        if waited < self._next_s:
            return []
        self._next_s = waited + min(max(waited, FIRST_S), LONGEST_S)
        self._told = True
        return [room.line(waited)]

    def _end(self, now: float) -> list[str]:
        since, told = self._since, self._told
        self._since, self._next_s, self._told = None, FIRST_S, False
        if since is None or not told:
            return []
        return [f"there is room for the workers after {now - since:.0f} s; they start"]
