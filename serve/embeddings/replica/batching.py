"""Dynamic batching: a batch is closed only when the model is free to run it.

So the batches grow with the load. Ray's `@serve.batch` closes a batch `batch_wait_timeout_s` after
its first item, even while the model still runs the previous one, so that many small batches queue
up under load; benchmarks/serving/batching.py compares the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Collects single items into batches and runs one batch at a time.

    Args:
        run: maps a list of items to the list of their results.
        batch_size: items in one batch at most.
        max_wait_s: seconds to wait for more items after the first, while `run` is idle.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[list[Result]]],
        *,
        batch_size: int,
        max_wait_s: float,
    ) -> None:
        self._run = run
        self._batch_size = batch_size
        self._max_wait_s = max_wait_s
        self._queue: asyncio.Queue[_Waiting[Item, Result]] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._loop())

    async def submit(self, item: Item) -> Result:
        """Queues an item and returns its result; if cancelled before its batch, it is not run.

        Raises:
            Exception: what `run` raised for the batch.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Waiting(item, future))
        return await future

    async def _loop(self) -> None:
        while True:
            batch = [w for w in await self._next_batch() if not w.future.done()]
            if not batch:
                continue
            try:
                results = await self._run([waiting.item for waiting in batch])
            except Exception as error:  # handed to every caller of the batch
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
                continue
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(result)

    async def _next_batch(self) -> list[_Waiting[Item, Result]]:
        batch = [await self._queue.get()]
        deadline = asyncio.get_running_loop().time() + self._max_wait_s
        while len(batch) < self._batch_size:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
        return batch
