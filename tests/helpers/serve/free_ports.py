"""Ports that nothing listens on, for programs that are told where to listen."""

from __future__ import annotations

import functools
import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

FIRST = 20_000
"""The ports below are those of Ray's workers."""
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Returns free ports of 127.0.0.1, none of them twice in the life of this process.

    Whoever asks for a port listens there some seconds later. Of the ports that the system gives
    away by itself, any could be that of somebody's connection by then. So these are others, and the
    processes that share the suite never get the same.
    """
    return list(itertools.islice(filter(_is_free, _candidates()), count))


@functools.cache
def _candidates() -> Iterator[int]:
    end = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ours = range(FIRST + process, end, processes)
    start = random.SystemRandom().randrange(len(ours))  # another suite may run on this host
    return itertools.cycle([*ours[start:], *ours[:start]])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
