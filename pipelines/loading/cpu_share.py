"""Each rank's share of the cluster's CPUs for loading, and what is said when none is left.

Every rank runs its own Ray dataset. The shares add up to what workers, actors and placement groups
leave, so no rank can starve another. Other runs that train on the cluster read as well, and the
rest is divided among all of their workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.config.train import PretrainConfig
from pipelines.runtime.cluster import start_ray
from pipelines.worker_group.cluster_use import ClusterUse, read_use

LEAST_CPUS = 0.05
"""Smallest share of a CPU for one rank; with less, reading does not begin."""
TOLD_SECONDS = 60.0
"""How often it is said that data or a CPU is waited for."""
LOOK_SECONDS = 2.0
"""Pause between two looks for a CPU."""


class StarvedError(RuntimeError):
    """A run's own workers leave Ray Data no CPU to run on."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of the cluster that one rank's dataset may use."""

    cpus: float
    """CPUs for all its tasks together."""
    read_cpus: float
    """CPUs for one read task."""
    decode_cpus: float
    """CPUs for one decode task; 0 when the trainer decodes."""
    object_store_bytes: float


def cluster_share(
    cfg: PretrainConfig, world_size: int, datasets: int = 1, say: Callable[[str], None] = print
) -> Share:
    """Returns an equal share of the CPUs that nobody holds, so no rank starves another.

    Each rank has as many shares as it reads data sets. Waits while others hold all CPUs, with a
    line a minute.

    Without shares the ranks can deadlock: one waits for a CPU that a paused task of a second rank
    holds, while the second waits for the first in a collective. Shares that add up to what the
    cluster has rule that out.

    Args:
        cfg: the run.
        world_size: number of its workers.
        datasets: number of data sets that each of them reads.
        say: takes a line for the user.

    Raises:
        StarvedError: the train workers leave no CPU, whatever else runs.
    """
    import ray

    start_ray()
    told = time.monotonic() - TOLD_SECONDS
    while True:
        use, mine = read_use(), _own_group()
        share = share_of(
            cfg, use, world_size, datasets, in_group=mine is not None, taken=_held_by_task()
        )
        if share is not None:
            return share
        others = read_use(mine)
        if others.held_cpus < LEAST_CPUS:
            total = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
            raise StarvedError(_starved_message(total))
        if time.monotonic() - told >= TOLD_SECONDS:
            told = time.monotonic()
            say(f"waiting for a CPU to read data with: {crowd(others)}")
        time.sleep(LOOK_SECONDS)


def share_of(
    cfg: PretrainConfig,
    use: ClusterUse,
    world_size: int,
    datasets: int = 1,
    *,
    in_group: bool = False,
    taken: float = 0.0,
) -> Share | None:
    """Returns one share of what is left of a cluster; None if that is too little.

    Args:
        cfg: the run.
        use: what there is and what is held, by the run's own workers too.
        world_size: number of the run's workers.
        datasets: number of data sets that each of them reads.
        in_group: whether these workers are among `use.readers`.
        taken: CPUs that they hold beside what `use` knows of.
    """
    free = {
        node: there.get("CPU", 0.0) - use.held.get(node, {}).get("CPU", 0.0)
        for node, there in use.nodes.items()
    }
    left = sum(max(0.0, cpus) for cpus in free.values()) - taken
    others = use.readers - (world_size if in_group else 0)
    shares = world_size * datasets + max(0, others)
    if left < LEAST_CPUS * shares:
        return None
    cpus = left / shares
    # A task runs on one node: what is left there bounds it.
    one_task = min(cpus, max(free.values()))
    in_data = cfg.data.decode_in == "data"
    read_cpus = min(0.5, one_task / 4) if in_data else min(1.0, one_task)
    memory = sum(node.get("object_store_memory", 0.0) for node in use.nodes.values())
    return Share(
        cpus=cpus,
        read_cpus=_floor_cpus(read_cpus),
        decode_cpus=_floor_cpus(min(1.0, one_task, cpus - read_cpus)) if in_data else 0.0,
        object_store_bytes=0.5 * memory / shares,
    )


def _own_group() -> str | None:
    """Returns the id of this worker's placement group; None if it is in none."""
    import ray

    group = ray.util.get_current_placement_group()
    return group.id.hex() if group is not None else None


def _held_by_task() -> float:
    """Returns the CPUs of the task that this is, if it is one."""
    import ray

    context: Any = ray.get_runtime_context()
    is_task = context.worker.mode == ray.WORKER_MODE and context.get_actor_id() is None
    return context.get_assigned_resources().get("CPU", 0.0) if is_task else 0.0


def _floor_cpus(cpus: float) -> float:
    return int(cpus * 1000) / 1000  # Ray counts in ten-thousandths


def _starved_message(cpus: float) -> str:
    return (
        f"no CPU for Ray Data to read with: the train workers take all {cpus:g} CPUs; lower "
        "--run.cpus-per-worker (or --run.workers), or give Ray more CPUs"
    )


def crowd(use: ClusterUse) -> str:
    """Says what others hold of the cluster's CPUs."""
    who = f" ({use.told()})" if use.holders else ""
    return f"others hold {use.held_cpus:g} of {use.cpus:g} CPUs{who}"


def crowd_now() -> str:
    """Says in a worker what others hold of the cluster's CPUs now."""
    return crowd(read_use(_own_group()))


def tell_crowd(share: Share, shares: int, say: Callable[[str], None]) -> None:
    """Says a line if others hold CPUs, and what is left to read with.

    Args:
        share: one share.
        shares: how many shares the run has.
        say: takes the line.
    """
    use = read_use(_own_group())
    if use.held_cpus >= LEAST_CPUS:
        say(f"{crowd(use)}; this run reads data with {share.cpus * shares:.3g}")


class DataWatch:
    """Says that a worker waits for data; called while a batch is awaited, the first or a later one.

    Args:
        rank: number of the worker.
        say: takes a line for the user.
    """

    def __init__(self, rank: int, say: Callable[[str], None]) -> None:
        self._rank, self._say = rank, say
        self._told = 0.0

    def __call__(self, waited: float) -> None:
        """Says a line a minute.

        Args:
            waited: seconds since the batch has been asked for.
        """
        import ray

        if waited < self._told:  # another batch
            self._told = 0.0
        if waited - self._told < TOLD_SECONDS:
            return
        self._told = waited
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        self._say(
            f"worker {self._rank} has waited for data for {waited:.0f} s: {free:.3g} CPUs are "
            f"free, {crowd_now()}"
        )
