"""Dynamic batching: a batch is closed only when the model is free to run it.

So the batches grow with the load. Ray's `@serve.batch` closes a batch `batch_wait_timeout_s` after
its first item, even while the model still runs the previous one, so that many small batches queue
up under load; benchmarks/serving/batching.py compares the two.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Collects single items into batches and runs some batches at the same time.

    Items leave in the order in which they came. Batches that may begin at the same time share what
    waits evenly.

    Args:
        run: maps a list of items to the list of their results.
        batch_size: items in progress at most, in all batches together.
        max_wait_s: seconds that a batch waits until it is full. It waits only if the batch before
            had company, that is more than one item: a single client gains nothing from it.
        max_concurrent_batches: batches that run at the same time at most.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Result]]],
        *,
        batch_size: int,
        max_wait_s: float,
        max_concurrent_batches: int = 1,
    ) -> None:
        self._run = run
        self._most = max(1, batch_size // max_concurrent_batches)
        self._max_wait_s = max_wait_s
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._arrived, self._turn = asyncio.Event(), asyncio.Lock()
        self._had_company, self._free = False, max_concurrent_batches
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run_batches()) for _ in range(max_concurrent_batches)]

    async def submit(self, item: Item) -> Result:
        """Queues an item and returns its result; if cancelled before its batch, it is not run.

        Raises:
            Exception: what `run` raised for the batch.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, future))
        self._arrived.set()
        return await future

    async def _run_batches(self) -> None:
        while True:
            async with self._turn:
                batch = await self._next_batch()
            self._free -= 1
            await self._answer([waiting for waiting in batch if not waiting.future.done()])
            self._free += 1

    async def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        if not batch:
            return
        try:
            results = await self._run([waiting.item for waiting in batch])
        except Exception as error:  # handed to every caller of the batch
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(result)

    async def _next_batch(self) -> list[_Waiting[Item, Result]]:
        await self._filled(1)
        if self._had_company:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._max_wait_s):
                    await self._filled(self._most * self._free)
        size = min(self._most, math.ceil(len(self._waiting) / self._free))
        self._had_company = len(self._waiting) > 1
        return [self._waiting.popleft() for _ in range(size)]

    async def _filled(self, count: int) -> None:
        """Returns when as many items wait."""
        while len(self._waiting) < count:
            self._arrived.clear()
            await self._arrived.wait()
