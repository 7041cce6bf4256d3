"""Runs a generator ahead of its consumer, in a thread of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

WATCH_SECONDS = 5.0
"""How often `watch` is called while an item is awaited."""
CLOSE_SECONDS = 10.0
"""How long closing waits for the thread, which may be blocked in Ray."""
_END = object()


class Prefetch(Iterator[T]):
    """Runs `source` in a thread of its own, from now on and at most `depth` items ahead.

    To be closed, as a generator is. It raises whatever `source` raises, where it would have
    yielded.

    Args:
        source: the generator, which is closed in its thread when the consumer stops.
        depth: number of items kept ready.
        watch: called every `WATCH_SECONDS` while an item is awaited, with the seconds since it has
            been; may raise.
    """

    def __init__(
        self, source: Generator[T], depth: int, watch: Callable[[float], None] = lambda _: None
    ) -> None:
        self._items: queue.Queue[Any] = queue.Queue(depth)
        self._stop, self._watch = threading.Event(), watch
        args = (source, self._items, self._stop)
        self._thread = threading.Thread(target=_run, args=args, name="loader", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        item = _next(self._items, self._watch)
        if item is _END or isinstance(item, _Failure):
            self.close()
            raise item.error if isinstance(item, _Failure) else StopIteration
        ready: T = item
        return ready

    def close(self) -> None:
        """Stops the thread, which closes the source."""
        self._stop.set()
        self._thread.join(timeout=CLOSE_SECONDS)


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def _run(source: Generator[Any], items: queue.Queue[Any], stop: threading.Event) -> None:
    def put(item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.1)

    try:
        with contextlib.closing(source):
            for item in source:
                put(item)
                if stop.is_set():
                    return
        put(_END)
    except BaseException as error:  # crosses to the consumer, which raises it
        put(_Failure(error))


def _next(items: queue.Queue[Any], watch: Callable[[float], None]) -> Any:
    began = time.monotonic()
    while True:
        try:
            return items.get(timeout=WATCH_SECONDS)
        except queue.Empty:
            watch(time.monotonic() - began)
