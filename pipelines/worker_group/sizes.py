"""How many workers train a run, and in how many micro-batches each of them."""

from __future__ import annotations

import dataclasses

from pipelines.config.train import PretrainConfig
from pipelines.runtime.cluster import DATA_CPUS
from pipelines.worker_group.cluster_use import EPSILON


def largest_size(
    sizes: tuple[int, ...], fitting: int, free_cpus: float, cpus_per_worker: float
) -> int:
    """Returns the largest allowed size of a group, or 0 if none can start.

    Args:
        sizes: Allowed sizes, ascending.
        fitting: Number of workers for which there is room.
        free_cpus: CPUs that nobody else holds. Some must be left to read data with.
        cpus_per_worker: What each worker reserves of them.
    """
    return max(
        (
            n
            for n in sizes
            if n <= fitting and free_cpus - n * cpus_per_worker >= DATA_CPUS - EPSILON
        ),
        default=0,
    )


def at_size(cfg: PretrainConfig, workers: int) -> PretrainConfig:
    """Returns a run as a group of this many workers trains it.

    A smaller group than the largest one makes more micro-batches, so that each is as small and
    takes as much memory. The gradient stays the mean over the batch. Where rows of a micro-batch
    are compared with each other, their number decides the loss, and so it stays.
    """
    if not cfg.run.elastic or cfg.compares_rows:
        return cfg
    whole = cfg.data.lanes if cfg.anchor.weight else cfg.data.batch_size
    least = -(-cfg.group_sizes[-1] * cfg.run.accumulate // workers)
    parts = (a for a in range(least, whole + 1) if whole % (workers * a) == 0)
    run = dataclasses.replace(cfg.run, accumulate=next(parts, cfg.run.accumulate))
    return dataclasses.replace(cfg, run=run)
