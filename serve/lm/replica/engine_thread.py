"""The one thread that runs the engine; other threads have it run their calls between ticks."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from models.sink_lm.engine.engine import Engine

STUCK_AFTER_S = 300.0
_IDLE_WAIT_S = 0.01
Result = TypeVar("Result")


class EngineThread:
    """Ticks an engine for as long as there is work.

    Args:
        engine: used by this thread only, except to take the events of a generation.
        threads: torch threads of a tick; None takes every core the process may use.
    """

    def __init__(self, engine: Engine, threads: int | None) -> None:
        self._engine = engine
        self._threads = threads
        self._wanted: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._beat = time.monotonic()
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], Result]) -> Result:
        """Runs `work` between two ticks and returns what it returns."""
        future: Future[Result] = Future()
        self._wanted.put((work, future))
        return await asyncio.wrap_future(future)

    def check(self) -> None:
        """Raises RuntimeError when the thread has died or a tick hangs."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the engine stopped: {self._failure}")
        if time.monotonic() - self._beat > STUCK_AFTER_S:
            raise RuntimeError(f"a tick has been running for over {STUCK_AFTER_S:.0f} s")

    def stop(self) -> None:
        """Ends the thread after the tick in progress, and waits for that."""
        self._stopping = True
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._beat = time.monotonic()
                    self._do_wanted()
                    if not self._engine.tick():
                        self._engine.wait_for_work(_IDLE_WAIT_S)
        except BaseException as error:
            self._failure = error  # `check` tells Serve, which starts a new replica
            raise

    def _do_wanted(self) -> None:
        while not self._wanted.empty():
            work, future = self._wanted.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except Exception as error:  # the caller's to handle
                future.set_exception(error)
