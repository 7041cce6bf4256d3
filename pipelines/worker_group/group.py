"""What Ray Train's controller knows of a group of workers, for the policies that run there.

Ray pickles the policies and callbacks of a run apart and runs all of them in one process, the
controller, which serves one run. There they share one `Group`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import ReportCallback, WorkerGroupCallback

FIRST_PAUSE_S = 30.0
LONGEST_PAUSE_S = 600.0
ANSWER_S = 10.0
"""How long a worker may take to answer before its host counts as lost."""
REFUSED_S = 120.0
"""How long a size is not tried again for which Ray found no place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """Where a worker runs."""

    node: str
    """Ray's id of the node."""
    address: str

    def __str__(self) -> str:
        return self.address


@dataclasses.dataclass
class Group:
    """The group of workers that trains a run now, and what has happened to it."""

    hosts: dict[int, Host] = dataclasses.field(default_factory=dict)
    """By rank; those of the newest group."""
    actors: dict[int, Any] = dataclasses.field(default_factory=dict)
    """Handles of its workers, by rank."""
    placement: str | None = None
    """Id of its placement group, hex."""
    step: int | None = None
    """Step of the newest checkpoint that was committed here."""
    faults: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    """How often a host failed by itself, by its address and the kind of the fault."""
    left_out: dict[str, float] = dataclasses.field(default_factory=dict)
    """Nodes that are not used for a while, and until when (`time.monotonic`)."""
    refused: tuple[int, float] | None = None
    """A size for which Ray found no place, and until when it is not tried again."""

    def leave_out(self, host: Host, fault: str) -> float:
        """Uses a host no more for a time that doubles with every further fault of one kind.

        Returns:
            Seconds.
        """
        key = (host.address, fault)
        self.faults[key] = self.faults.get(key, 0) + 1
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self.faults[key] - 1))
        self.left_out[host.node] = time.monotonic() + pause
        return pause

    def lost(self, known: Collection[int]) -> dict[int, RayActorError]:
        """Returns why workers do not answer, by rank, and uses their hosts no more for a while.

        When a host is lost, the first errors come from workers that had been talking to it.

        Args:
            known: Ranks of which there is an error already.
        """
        asked = {r: a.get_metadata.remote() for r, a in self.actors.items() if r not in known}
        if not asked:
            return {}
        answered, _ = ray.wait([*asked.values()], num_returns=len(asked), timeout=ANSWER_S)
        silent = {rank: ref for rank, ref in asked.items() if ref not in answered}
        found = {rank: RayActorError(error_msg="it does not answer") for rank in silent}
        for rank, ref in asked.items():
            if rank not in silent:
                try:
                    ray.get(ref)
                except RayActorError as error:
                    found[rank] = error
        until = time.monotonic() + FIRST_PAUSE_S
        self.left_out |= {self.hosts[rank].node: until for rank in silent}
        return found

    def avoided(self) -> frozenset[str]:
        """Returns the nodes that are not used now."""
        now = time.monotonic()
        return frozenset(node for node, until in self.left_out.items() if until > now)

    def refuse(self, size: int) -> None:
        """Tries smaller groups for a while: tasks hold what should be free, or a host is gone."""
        self.refused = (size, time.monotonic() + REFUSED_S)

    def worth_trying(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes below one that was refused a moment ago; all if there is none."""
        if self.refused is None or self.refused[1] <= time.monotonic():
            return sizes
        return tuple(size for size in sizes if size < self.refused[0]) or sizes

    def since(self) -> str:
        """Says from where the next group goes on."""
        return "the newest checkpoint, if any" if self.step is None else f"step {self.step}"


@functools.cache
def this_group() -> Group:
    """Returns the group of this process."""
    return Group()


class GroupWatch(WorkerGroupCallback, ReportCallback):
    """Keeps `Group` up to date, and says with how many workers an elastic group trains.

    Args:
        most: The largest number of workers; None if it cannot change.
        say: Takes a line. Must survive pickling.
    """

    def __init__(self, most: int | None, say: Callable[[str], None]) -> None:
        self._most, self._say = most, say

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray Train when all workers of a new group are there."""
        group, before = this_group(), len(this_group().hosts)
        workers = worker_group.get_workers()
        by_rank = {worker.distributed_context.world_rank: worker for worker in workers}
        group.hosts = {rank: _host(worker) for rank, worker in by_rank.items()}
        group.actors = {rank: worker.actor for rank, worker in by_rank.items()}
        handle = worker_group.get_worker_group_state().placement_group_handle
        group.placement = handle.placement_group.id.hex()
        if self._most is not None and len(workers) != before:
            self._say(size_line(group.hosts, before, self._most))

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Called by Ray Train when a checkpoint of all workers has been committed."""
        this_group().step = metrics[0].get("step")


def _host(worker: Any) -> Host:
    told = worker.metadata
    return Host(node=told.node_id, address=told.node_ip)


def size_line(hosts: Mapping[int, Host], before: int, most: int) -> str:
    """Says with how many workers a group trains, and where.

    Args:
        hosts: By rank.
        before: Size of the group before it; 0 if it is the first.
        most: The largest size.
    """
    size = len(hosts)
    told = f"training with {size} of at most {most} worker{'s' if most > 1 else ''}"
    if before:
        told += f" instead of {before}"
    return f"{told} ({counted(str(host) for host in hosts.values())})"


def counted(names: Any) -> str:
    """Returns names in order, each once, with how often it occurs."""
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return ", ".join(f"{count} on {name}" for name, count in found.items())


def selector(avoided: Collection[str]) -> dict[str, str] | None:
    """Returns Ray's label selector of all nodes but these; None if any node will do."""
    return {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else None
