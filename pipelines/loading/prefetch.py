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


def prefetch(source: Generator[T], depth: int, watch: Callable[[float], None]) -> Iterator[T]:
    """Runs `source` in a thread of its own, at most `depth` items ahead.

    Args:
        source: the generator, which is closed in its thread when the consumer stops.
        depth: number of items kept ready.
        watch: called every `WATCH_SECONDS` while an item is awaited, with the seconds since it has
            been; may raise.

    Raises:
        Whatever `source` raises, where it would have yielded.
    """
    items: queue.Queue[Any] = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.1)

    def run() -> None:
        try:
            with contextlib.closing(source):
                for item in source:
                    put(item)
                    if stop.is_set():
                        return
            put(end)
        except BaseException as error:  # crosses to the consumer, which raises it
            put(_Failure(error))

    thread = threading.Thread(target=run, name="loader", daemon=True)
    thread.start()
    try:
        while (item := _next(items, watch)) is not end:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join(timeout=CLOSE_SECONDS)


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def _next(items: queue.Queue[Any], watch: Callable[[float], None]) -> Any:
    began = time.monotonic()
    while True:
        try:
            return items.get(timeout=WATCH_SECONDS)
        except queue.Empty:
            watch(time.monotonic() - began)
