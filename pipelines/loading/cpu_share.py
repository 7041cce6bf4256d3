"""Each rank's share of the cluster's CPUs for loading, and the error when none is left.

Every rank runs its own Ray dataset. The shares add up to what the train workers leave, so no rank
can starve another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipelines.config.train import PretrainConfig
from pipelines.runtime.cluster import start_ray

STARVED_SECONDS = 60.0
"""Loading fails if there is no first batch and no free CPU for this long."""
LEAST_CPUS = 0.05
"""Smallest share of a CPU for one rank; less is taken for a mistake in the settings."""


class StarvedError(RuntimeError):
    """Ray Data has no CPU to run on."""


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


def cluster_share(cfg: PretrainConfig, world_size: int, datasets: int = 1) -> Share:
    """Returns an equal share of the CPUs that the train workers leave, so no rank starves another.

    Each rank has as many shares as it reads data sets.

    Without shares the ranks can deadlock: one waits for a CPU that a paused task of a second rank
    holds, while the second waits for the first in a collective. Shares that add up to what the
    cluster has rule that out.

    Raises:
        StarvedError: the train workers leave no CPU.
    """
    import ray

    start_ray()
    context: Any = ray.get_runtime_context()
    in_worker = context.worker.mode == ray.WORKER_MODE
    assigned = context.get_assigned_resources().get("CPU", 0.0) if in_worker else 0.0
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free = total.get("CPU", 0.0) - world_size * assigned
    shares = world_size * datasets
    if free < LEAST_CPUS * shares:
        raise StarvedError(_starved_message(f"{free:g} of {total.get('CPU', 0):g} CPUs are left"))
    cpus = free / shares
    in_data = cfg.data.decode_in == "data"
    read_cpus = min(0.5, cpus / 4) if in_data else min(1.0, cpus)
    return Share(
        cpus=cpus,
        read_cpus=_floor_cpus(read_cpus),
        decode_cpus=_floor_cpus(min(1.0, cpus - read_cpus)) if in_data else 0.0,
        object_store_bytes=0.5 * total.get("object_store_memory", 0.0) / shares,
    )


def _floor_cpus(cpus: float) -> float:
    return int(cpus * 1000) / 1000  # Ray counts in ten-thousandths


def _starved_message(what: str) -> str:
    return (
        f"no CPU for Ray Data to read with: {what} beside the train workers; lower "
        "--run.cpus-per-worker (or --run.workers), or give Ray more CPUs"
    )


class StarvationWatch:
    """Raises once no CPU has been free for `STARVED_SECONDS`; called while a batch is awaited."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.last_free = time.monotonic()

    def __call__(self) -> None:
        """Looks for a free CPU.

        Raises:
            StarvedError: for STARVED_SECONDS there has been no CPU to run a read task on.
        """
        import ray

        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        if free >= self.share.read_cpus:
            self.last_free = time.monotonic()
        elif time.monotonic() - self.last_free > STARVED_SECONDS:
            raise StarvedError(_starved_message(f"{free:g} CPUs have been free for a minute"))
