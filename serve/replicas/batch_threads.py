"""The threads in which forward passes run.

On a CPU, several small batches with few torch threads each take less time than a large one with
all of them: nothing waits at the end of every operator for the slowest thread, which is the one
whose core also decodes pictures or answers requests. And when one batch ends, the others keep the
cores busy until its clients have sent their next pictures.

An image that is alone is encoded by all torch threads, which meet after every operator, some 200
times in 20 ms. OpenMP's threads wait for one another in a loop, which takes microseconds, but only
while the process has no more of them than there are cores. Otherwise they go to sleep each time,
and the image takes 28 ms. So the thread that loads the model gets no helpers of its own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

MOST_CONCURRENT_BATCHES = 4
"""Forward passes at the same time at most, on a CPU."""

Result = TypeVar("Result")


class ThreadSettings(Protocol):
    """What of an application's settings decides its threads."""

    @property
    def threads(self) -> int | None:
        """Torch threads in all; None takes every core that the process may use."""

    @property
    def gpus(self) -> float:
        """GPUs of the replica."""

    @property
    def batch_size(self) -> int:
        """Items that are computed at the same time at most."""


class BatchThreads:
    """Runs several calls at the same time, and one that is alone with all torch threads.

    The thread that makes it computes with one torch thread from then on.

    Args:
        settings: the torch threads in all, and whether the model is on a GPU, which computes
            one batch after the other.

    Attributes:
        max_concurrent_batches: calls that may run at the same time.
    """

    def __init__(self, settings: ThreadSettings) -> None:
        threads = settings.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(1)
        most = min(threads, settings.batch_size, MOST_CONCURRENT_BATCHES)
        self.max_concurrent_batches = count = 1 if settings.gpus else most
        each, more = divmod(threads, count)
        self._shared = _pool([each + (number < more) for number in range(count)])
        # A GPU has one thread for all calls: another one would have memory of its own there.
        self._alone = _pool([threads]) if count > 1 else self._shared
        self._begun: list[float] = []

    async def run(self, call: Callable[[], Result], *, is_single: bool) -> Result:
        """Runs a call in a thread; the caller sees to it that no more than
        `max_concurrent_batches` run.

        Args:
            call: a forward pass.
            is_single: whether it is of a single item, which takes all torch threads if no other
                call runs.
        """
        pool = self._alone if is_single and not self._begun else self._shared
        begun = time.monotonic()
        self._begun.append(begun)
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, call)
        finally:
            self._begun.remove(begun)

    def longest_s(self) -> float:
        """Returns for how many seconds the oldest call has been running, or 0."""
        return time.monotonic() - min(self._begun) if self._begun else 0.0

    def warm_up(self, single: Callable[[], object], batch: Callable[[], object]) -> None:
        """Runs a single item with all torch threads, then a batch in each of the other threads."""
        self._alone.submit(single).result()
        for done in [self._shared.submit(batch) for _ in range(self.max_concurrent_batches)]:
            done.result()


def _pool(threads: list[int]) -> ThreadPoolExecutor:
    """Returns threads of which each calls torch with its own number of torch threads."""
    left = list(threads)

    def begin() -> None:
        # The first question in a thread gives it the number that any thread has set last, so it
        # comes before the thread's own number, which torch then keeps.
        torch.get_num_threads()
        torch.set_num_threads(left.pop())

    return ThreadPoolExecutor(len(left), initializer=begin)
