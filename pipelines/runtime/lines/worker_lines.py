"""Lines from workers on the driver's terminal: the Ray queue between them, and the progress bar."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

if TYPE_CHECKING:
    from ray.util.queue import Queue

STEP = re.compile(r"step (\d+)/(\d+) ")
"""How a line of `pipelines.training.loggers.progress_line` begins."""
SHARED = re.compile(r"waiting for a CPU to read data with|worker \d+ has waited for data")
"""How lines of `pipelines.loading.cpu_share` begin that all workers say when all of them wait."""
APART_S = 45.0
"""Seconds between two such lines. A worker says one every 60."""


@contextmanager
def worker_lines(stream: Any) -> Iterator[Queue]:
    """Yields a queue whose lines appear on the driver's `stream` until the block ends."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # With the driver, not on a node that may be lost while the run goes on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    printer = LinePrinter(stream)
    done = threading.Event()
    thread = threading.Thread(target=_drain, args=(queue, printer.show, done), daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join()
        printer.end()
        queue.shutdown()


def say_into(progress: Queue) -> Callable[[str], None]:
    """Returns a function that sends lines to the driver, and prints them here if the queue is lost.

    Losing the queue must not end a run.
    """
    return functools.partial(_put_or_print, progress)


def _put_or_print(progress: Queue, line: str) -> None:
    from ray.exceptions import RayActorError

    try:
        progress.put(line)
    except RayActorError:
        print(line)


def _drain(queue: Queue, show: Callable[[str], None], done: threading.Event) -> None:
    from ray.exceptions import RayActorError

    finished, echoes = False, Echoes()
    while not finished:
        finished = done.wait(0.3)  # one look more after the end
        try:
            while not queue.empty():
                if not echoes.has(line := queue.get(), time.monotonic()):
                    show(line)
        except RayActorError:
            show("WARNING: the process that brings progress lines here is lost; the run goes on")
            return


class Echoes:
    """Finds lines that another worker has just said, of a kind that is the same for all."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}

    def has(self, line: str, now: float) -> bool:
        """Returns whether a line that came at a moment, in seconds of any clock, is an echo."""
        kind = SHARED.match(line)
        if kind is None:
            return False
        words = re.sub(r"\d+", "", kind[0])
        if now - self._shown.get(words, -APART_S) < APART_S:
            return True
        self._shown[words] = now
        return False


class LinePrinter:
    """Shows lines of a run; on a terminal, lines that say a step move one progress bar instead.

    Args:
        stream: Where lines go. Unless it is a terminal, every line is written as it came.
    """

    def __init__(self, stream: Any) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._bar = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def show(self, line: str) -> None:
        """Shows one line."""
        step = STEP.match(line)
        if step and self._console.is_terminal:
            self._move_bar(line, done=int(step[1]), total=int(step[2]))
        else:
            self._console.print(line, markup=False)

    def end(self) -> None:
        """Leaves the last progress line standing."""
        self._bar.stop()

    def _move_bar(self, line: str, *, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._bar.add_task(line, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, description=line)
        self._bar.refresh()
