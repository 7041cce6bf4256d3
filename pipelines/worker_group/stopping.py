"""Stops a group of workers right after a checkpoint, so that another one goes on from there.

Two things ask for it: a host that is going to be taken away, of which Ray tells every worker, and
the controller, when there is room for more workers. The workers save a checkpoint, wait until it is
committed, and raise `GroupStoppedError`, upon which Ray Train starts the next group.
"""

from __future__ import annotations

import functools
import time
from typing import Any


class GroupStoppedError(RuntimeError):
    """A group has stopped after a checkpoint because it was asked to; this is no failure."""


class StopRequest:
    """What the controller has asked this process for."""

    def __init__(self) -> None:
        self.reason: str | None = None


@functools.cache
def stop_request() -> StopRequest:
    """Returns the request of this process."""
    return StopRequest()


def ask_to_stop(reason: str) -> None:
    """Runs in a worker's process: asks its group to stop after a checkpoint.

    Args:
        reason: Why, for the user.
    """
    stop_request().reason = reason


def stop_reason() -> str | None:
    """Says in a Ray Train worker why its group should stop; None if it should go on.

    Every worker must call it equally often. The answer of rank 0 counts.
    """
    import ray
    import ray.train

    told: Any = ray.train.get_preemption_info()
    if told is None:
        return stop_request().reason
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return notice_line(told, {node["NodeID"]: node for node in nodes}, time.time())


def notice_line(told: Any, nodes: dict[str, dict[str, Any]], now: float) -> str:
    """Says which hosts are going to be taken away, and when.

    Args:
        told: Ray's `PreemptionInfo`.
        nodes: `ray.nodes()` by id.
        now: Seconds since the epoch.
    """
    ids = told.preempted_node_ids
    hosts = ", ".join(nodes.get(one, {}).get("NodeManagerAddress", one) for one in ids)
    when = ""
    if told.deadline_ms:
        when = f" in {max(0.0, told.deadline_ms / 1000 - now):.0f} s"
    return f"host {hosts} is going to be taken away{when}"


def wait_until_committed(timeout_s: float = 600.0) -> None:
    """Waits in a Ray Train worker until its newest checkpoint counts."""
    import ray.train

    ray.train.get_all_reported_checkpoints(
        consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED,
        timeout_s=timeout_s,
    )
