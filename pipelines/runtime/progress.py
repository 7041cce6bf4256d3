"""Progress of items and bytes, and counts that grow; without a terminal they are lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Shows items done, items/s and MB/s of one stage; a context manager."""

    def __init__(
        self, console: Console, title: str, total_bytes: int, noun: str = "images"
    ) -> None:
        self._noun = noun
        self._console, self._title, self._total = console, title, max(total_bytes, 1)
        self._started = self._line = time.monotonic()
        self._items = self._bytes = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rates]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # the closing line stays instead
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=self._total, rates="")

    def advance(self, items: int, num_bytes: int) -> None:
        """Adds the items and bytes of one finished task."""
        self._items += items
        self._bytes += num_bytes
        self._bar.update(self._task, completed=self._bytes, rates=self._rates())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._line >= SECONDS_BETWEEN_LINES:
            self._line = now
            done = min(self._bytes / self._total, 1.0)
            self._console.print(f"{self._title} {done:.0%}  {self._rates()}")

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        items, megabytes = self._items / seconds, self._bytes / 1e6 / seconds
        return f"{self._items:,} {self._noun}  {items:,.0f} {self._noun}/s  {megabytes:,.1f} MB/s"

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if kind is None:
            self._console.print(f"{self._title} done  {self._rates()}")


@contextlib.contextmanager
def counting(console: Console, title: str, noun: str) -> Iterator[Callable[[int], None]]:
    """Yields what takes a count whose end is not known, and shows it as it grows.

    Args:
        console: Where it is shown; without a terminal, as a line now and then.
        title: What is done.
        noun: What is counted.
    """
    status = console.status(title) if console.is_terminal else None
    last = time.monotonic()

    def show(count: int) -> None:
        nonlocal last
        text, now = f"{title}  {count:,} {noun}", time.monotonic()
        if status is not None:
            status.update(text)
        elif now - last >= SECONDS_BETWEEN_LINES:
            last = now
            console.print(text)

    with status or contextlib.nullcontext():
        yield show
