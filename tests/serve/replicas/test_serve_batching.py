"""Batches of the embedder: who is in them, when they wait, and how many threads they take."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from serve.embeddings.settings import ServeSettings
from serve.replicas.batch_threads import BatchThreads
from serve.replicas.batching import Batcher


def test_batches_fill_while_the_model_is_busy() -> None:
    sizes: list[int] = []

    async def main() -> list[int]:
        is_busy, is_free = asyncio.Event(), asyncio.Event()

        async def run(items: list[int]) -> list[int]:
            sizes.append(len(items))
            is_busy.set()
            await is_free.wait()
            return [item * 10 for item in items]

        batcher = Batcher(run, batch_size=8, max_wait_s=0.0)
        first = asyncio.create_task(batcher.submit(0))
        await is_busy.wait()
        rest = [asyncio.create_task(batcher.submit(item)) for item in range(1, 13)]
        await asyncio.sleep(0)  # they come during the first batch
        is_free.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(main()) == [item * 10 for item in range(13)]
    assert sizes == [1, 8, 4]


def test_concurrent_batches_share_what_waits_in_its_order() -> None:
    seen: list[list[int]] = []

    async def main() -> None:
        is_free = asyncio.Event()

        async def run(items: list[int]) -> list[int]:
            seen.append(items)
            await is_free.wait()
            return items

        batcher = Batcher(run, batch_size=8, max_wait_s=0.0, max_concurrent_batches=2)
        asked = [asyncio.create_task(batcher.submit(item)) for item in range(6)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert seen == [[0, 1, 2], [3, 4, 5]]  # side by side, before any of them has ended
        asked += [asyncio.create_task(batcher.submit(item)) for item in range(6, 18)]
        is_free.set()
        assert await asyncio.gather(*asked) == list(range(18))

    asyncio.run(main())
    assert [item for items in seen for item in items] == list(range(18))
    assert max(map(len, seen)) == 4  # half of the batch size each


def test_only_a_batch_that_follows_company_waits() -> None:
    async def main() -> None:
        async def run(items: list[int]) -> list[int]:
            return items

        batcher = Batcher(run, batch_size=3, max_wait_s=60.0)
        async with asyncio.timeout(20):
            for item in range(3):  # one client, who asks again and again
                assert await batcher.submit(item) == item
            waiting = [asyncio.create_task(batcher.submit(item)) for item in range(2)]
            await asyncio.gather(*waiting)  # the last batch had no company, so this does not wait
        one = asyncio.create_task(batcher.submit(5))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not one.done()
        async with asyncio.timeout(20):
            assert await asyncio.gather(one, batcher.submit(6), batcher.submit(7)) == [5, 6, 7]

    asyncio.run(main())


def test_a_lone_item_takes_all_threads_and_others_share_them() -> None:
    async def main() -> None:
        threads = BatchThreads(ServeSettings(artifact="a", threads=6))
        assert threads.max_concurrent_batches == 4
        assert await threads.run(torch.get_num_threads, is_single=True) == 6
        assert await threads.run(torch.get_num_threads, is_single=False) in (1, 2)
        barrier = threading.Barrier(4, timeout=20)

        def together() -> int:
            barrier.wait()
            return torch.get_num_threads()

        singles = [False, True, True, True]  # single, but not alone
        calls = (threads.run(together, is_single=single) for single in singles)
        assert sorted(await asyncio.gather(*calls)) == [1, 1, 2, 2]
        assert threads.longest_s() == 0
        of_gpu = BatchThreads(ServeSettings(artifact="a", threads=6, gpus=1))
        found = {
            await of_gpu.run(threading.get_ident, is_single=single) for single in (True, False)
        }
        assert len(found) == 1

    asyncio.run(main())
    for more, count in (({"gpus": 1}, 1), ({"batch_size": 2}, 2)):
        threads = BatchThreads(ServeSettings(artifact="a", threads=6, **more))
        assert threads.max_concurrent_batches == count


def test_cancelled_and_failed_items_leave_the_others_alone() -> None:
    seen: list[list[int]] = []

    async def main() -> None:
        is_busy, is_free = asyncio.Event(), asyncio.Event()

        async def run(items: list[int]) -> list[int]:
            seen.append(items)
            is_busy.set()
            await is_free.wait()
            if 99 in items:
                raise RuntimeError("device lost")
            return items

        batcher = Batcher(run, batch_size=4, max_wait_s=0.0)
        running = asyncio.create_task(batcher.submit(1))
        await is_busy.wait()
        leaving, staying = (asyncio.create_task(batcher.submit(item)) for item in (2, 3))
        await asyncio.sleep(0)
        leaving.cancel()
        running.cancel()  # in the middle of its batch: the batch runs to its end
        await asyncio.sleep(0)
        is_free.set()
        assert await staying == 3
        with pytest.raises(RuntimeError, match="device lost"):
            await batcher.submit(99)
        assert await batcher.submit(4) == 4  # and the loop goes on

    asyncio.run(main())
    assert seen == [[1], [3], [99], [4]]
