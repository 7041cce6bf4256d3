"""Looks at the cluster beside a running job, and says what the user would otherwise not learn."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console

from pipelines.runtime.lines.hosts import Hosts, Node
from pipelines.runtime.lines.waiting import Room, Waiting

LOOK_S = 3.0


@dataclass(frozen=True)
class Group:
    """Workers that start together or not at all."""

    need: Mapping[str, float]
    """What each of them reserves on one host."""
    workers: int
    """How many there must be at the least."""


@contextlib.contextmanager
def cluster_lines(say: Callable[[str], None], group: Group | None = None) -> Iterator[None]:
    """Watches the cluster until the block ends.

    Args:
        say: Takes a line: a host is lost or has come, or workers wait for room; called in another
            thread.
        group: The workers whose room is watched for.
    """
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(say, group, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(2 * LOOK_S)  # it may hang in a question to a head that is gone


def plainly(console: Console) -> Callable[[str], None]:
    """Returns a function that prints lines on a console as they are."""
    return functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)


def _watch(say: Callable[[str], None], group: Group | None, done: threading.Event) -> None:
    import ray
    from ray.exceptions import RayError

    hosts, waiting = Hosts(), Waiting()
    while not done.wait(LOOK_S):
        if not ray.is_initialized():  # the calls below would start one
            continue
        try:
            nodes = ray.nodes()  # type: ignore[no-untyped-call]
            lines = hosts.lines(nodes)
            if group is not None:
                lines += waiting.lines(room_of(group, nodes), time.monotonic())
        except (RayError, RuntimeError, OSError):  # the head is away: asked again
            continue
        for line in lines:
            say(line)


def room_of(group: Group, nodes: list[Node]) -> Room:
    """Asks Ray what the cluster has free, and whether a group of this job has its room.

    Args:
        group: The workers.
        nodes: All nodes, as `ray.nodes` has them.
    """
    import ray
    from ray._private.state import available_resources_per_node  # no public call in 2.60
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    groups = [g for key, g in placement_group_table().items() if key.endswith(job)]
    return Room(
        workers=group.workers,
        need=group.need,
        hosts={node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]},
        free=available_resources_per_node(),  # type: ignore[no-untyped-call]
        placed=any(_is_placed(found, group.need) for found in groups),
    )


def _is_placed(found: Mapping[str, object], need: Mapping[str, float]) -> bool:
    bundles = found["bundles"]
    assert isinstance(bundles, Mapping)
    wanted = {name: amount for name, amount in need.items() if amount > 0}
    return found["state"] == "CREATED" and all(dict(b) == wanted for b in bundles.values())
