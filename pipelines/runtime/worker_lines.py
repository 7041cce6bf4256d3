"""Lines that workers say, on the driver's terminal: a Ray queue between them, and how lines are shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.queue import Queue


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


def _drain(queue: Queue, show: Callable[[str], None], done: threading.Event) -> None:
    from ray.exceptions import RayActorError

    finished = False
    while not finished:
        finished = done.wait(0.3)  # one look more after the end
        try:
            while not queue.empty():
                show(queue.get())
        except RayActorError as error:
            show(f"no more progress lines, the run goes on: {error}")
            return


class LinePrinter:
    """Shows lines: on a terminal a progress line is rewritten in place, other lines stay."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._terminal = bool(stream.isatty())
        self._open = False

    def show(self, line: str) -> None:
        """Shows one line."""
        in_place = self._terminal and line.startswith("step ")
        before = "\r\x1b[K" if self._open else ""
        self._stream.write(before + line + ("" if in_place else "\n"))
        self._stream.flush()
        self._open = in_place

    def end(self) -> None:
        """Leaves the last progress line standing."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
