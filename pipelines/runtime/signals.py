"""SIGTERM and ctrl-C as an event, so that a job ends at a point of its choosing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or SIGINT sets; a second one acts as usual."""
    stop = threading.Event()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in kept.items():
            signal.signal(number, handler)

    def handle(*_: object) -> None:
        stop.set()
        restore()

    for number in kept:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
