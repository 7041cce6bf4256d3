"""A lock that a loop of ticks and its callers share fairly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TickLock:
    """Gives callers their turn between two ticks.

    With one lock alone, a loop of ticks takes it again before any other thread wakes up. Here a
    caller holds a second lock while it waits, and the next tick needs both to begin.
    """

    def __init__(self) -> None:
        self._next, self._lock = threading.RLock(), threading.RLock()

    @contextmanager
    def between_ticks(self) -> Iterator[None]:
        """Waits for the tick in progress and keeps the next one from beginning."""
        with self._next, self._lock:
            yield

    @contextmanager
    def tick(self) -> Iterator[None]:
        """Waits for the callers who came first; later ones wait for this tick."""
        with self._next:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()
