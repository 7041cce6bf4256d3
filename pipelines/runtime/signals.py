"""SIGTERM and ctrl-C: as an event, so that a job ends at a point of its choosing, or in order."""

from __future__ import annotations

import contextlib
import signal
import sys
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


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Lets this process end in order at SIGTERM, although Ray is started inside the block.

    Ray's handler of signals in C++ would print a traceback of its own and end the process at once:
    what it holds, as the lease on a run, would stay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if callable(before) else _stop)


def _stop(*_: object) -> None:
    sys.exit("error: stopped by SIGTERM; the same command goes on from what is done")
