"""Keeps lines of Ray off the terminal that a user need not read; its log files have them all."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

WORDS = {
    "Cluster resources are not enough to run any task": (
        "waiting for a free CPU of the cluster: all are taken (`ray status -v` says by whom)"
    ),
    "does not have any available CPUs": (
        "waiting for a free CPU of the cluster: all are taken (`ray status -v` says by whom)"
    ),
    "an actor died during initialization": "WARNING: a worker died as it started, and is replaced",
}
"""What Ray Data warns of that a user needs to know, and our words for it."""
RESTARTS = re.compile(rb"has constructor arguments in the object store and max_restarts > 0")
"""Ray Data hands its own arguments to the actors of a pool in this way, in every run. The line
comes from Ray's C++ core, which no logger reaches."""


LOST = "A worker died or was killed while executing a task"
LITTLE_MEMORY = "were killed due to the node running low on memory"
EVERYDAY = (
    "types of tasks seen",
    "worker processes have been started on node",
    "has been marked dead because the detector",  # `pipelines.runtime.lines.hosts` says it
    "cannot be scheduled right now",
    "ServeController.graceful_shutdown failed",  # with which Serve's controller ends itself
)
"""What the nodes of a cluster send to every driver and no user needs."""


def quiet_ray(*, training: bool = False) -> None:
    """Silences console lines of Ray, but for what a user needs to know, which is said in words.

    Args:
        training: Losses of processes are told by Ray Train's failure policy.
    """
    from ray._private.log import PlainRayHandler
    from ray._private.ray_logging import stdout_deduplicator

    # Ray's own setting (RAY_DEDUP_LOGS_SKIP_REGEX), which is read too early to be set here.
    printed: Any = stdout_deduplicator
    if printed.skip_re is None:
        printed.skip_re = NodeLines(losses=not training)
    for name in (
        "ray._private.authentication.authentication_token_setup",  # that its default is its default
        "ray.data._internal.progress",  # that our meters stand in place of its bars
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        filtered = any(isinstance(one, Reworded) for one in handler.filters)
        if isinstance(handler, PlainRayHandler) and not filtered:
            handler.addFilter(Reworded())


class Reworded(logging.Filter):
    """Lets no record pass; says in our words, once each, what a user needs to know of them."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns False."""
        message = record.getMessage()
        line = next((ours for theirs, ours in WORDS.items() if theirs in message), None)
        if line and line not in self._said:
            self._said.add(line)
            _say(line)
        return False


class NodeLines:
    """In place of a pattern: finds the lines of nodes that Ray is not to print.

    Args:
        losses: Whether to say that a process was lost.
    """

    def __init__(self, *, losses: bool) -> None:
        self._losses = losses

    def search(self, line: str) -> bool:
        """Returns whether Ray is not to print a line, and says in words what is needed of it."""
        if LOST in line and self._losses:
            _say("WARNING: a process was lost with a part of the work, which is done again")
        if LITTLE_MEMORY in line:
            _say(f"WARNING: {line.strip().partition('. ')[0]}")
        return any(theirs in line for theirs in (*EVERYDAY, LOST, LITTLE_MEMORY))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stderr_without(pattern: re.Pattern[bytes]) -> Iterator[None]:
    """Drops the lines of this process's stderr that match, also those of C++ code.

    Nothing that is started inside may inherit stderr and outlive the block.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    thread = threading.Thread(target=_pass_on, args=(source, kept, pattern), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)  # which closes the last writing end
        thread.join()
        os.close(kept)


def _pass_on(source: int, sink: int, pattern: re.Pattern[bytes]) -> None:
    with os.fdopen(source, "rb") as lines:
        for line in lines:
            if not pattern.search(line):
                os.write(sink, line)
