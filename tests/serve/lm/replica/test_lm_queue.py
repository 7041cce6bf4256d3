"""The queue for slabs, and how soon a slab is free when its client leaves."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.lm.serving import MODEL, Cluster, ask, cluster, read, run, say, slabs, web
from helpers.lm.streamed import streamed
from helpers.waiting import LIMIT_S, eventually
from serve.ingress.errors import ApiError
from serve.lm.frontend import replies as lm_http_replies
from serve.lm.frontend.events import PING

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"max_tokens": None}


def one_slab(folder: Path, **settings: Any) -> Any:
    return cluster(folder, **({"sessions": 1, "max_choices": 1} | settings))


async def post(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post(
        "/v1/completions", json=GREEDY | {"prompt": "ab", "max_tokens": 3} | body
    )


def waits(made: Cluster, count: int) -> Any:
    return lambda: len(made.replica._queue) == count


def test_first_come_first_served(tiny_lm: Path) -> None:
    async def test() -> None:
        async with one_slab(tiny_lm) as made, web(made) as http:
            await made.replica.start(ask("holder", None, "x", **ENDLESS))
            done: list[int] = []

            async def request(number: int) -> None:
                reply = await post(http, prompt=f"{number}")
                assert reply.status_code == 200, reply.text
                done.append(number)

            calls = []
            for number in range(5):
                calls.append(asyncio.ensure_future(request(number)))
                await eventually(waits(made, number + 1))
            await asyncio.sleep(0.2)
            assert not done
            registry = made.replica._reporter._registry
            assert registry.get_sample_value("rayjepa_queued_requests") == 5
            await made.replica.cancel("holder")
            await asyncio.gather(*calls)
            assert done == [0, 1, 2, 3, 4]
            assert registry.get_sample_value("rayjepa_queued_requests") == 0
            assert registry.get_sample_value("rayjepa_queue_wait_seconds_count") == 5
            assert registry.get_sample_value("rayjepa_queue_wait_seconds_sum") >= 5 * 0.2

    run(test())


@pytest.mark.parametrize(("limit", "word"), [(0, "in use;"), (1, "1 requests wait")])
def test_too_many_are_refused_at_once(limit: int, word: str, tiny_lm: Path) -> None:
    async def test() -> None:
        async with one_slab(tiny_lm, max_queued=limit) as made, web(made) as http:
            await made.replica.start(ask("holder", None, "x", **ENDLESS))
            calls = [asyncio.ensure_future(post(http)) for _ in range(limit)]
            await eventually(waits(made, limit))
            refused = await post(http)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            error = refused.json()["error"]
            assert (error["code"], error["type"]) == ("no_free_slab", "rate_limit_error")
            assert word in error["message"]
            await made.replica.cancel("holder")
            for call in calls:
                assert (await call).status_code == 200

    run(test())


def test_a_wait_has_an_end_and_counts_as_part_of_the_reply_s_time(tiny_lm: Path) -> None:
    async def test(status: int, code: str, **settings: float) -> None:
        async with one_slab(tiny_lm, **settings) as made, web(made) as http:
            await made.replica.start(ask("holder", None, "x", **ENDLESS))
            begun = time.monotonic()
            late = await post(http)
            assert (late.status_code, late.json()["error"]["code"]) == (status, code)
            assert 0.3 <= time.monotonic() - begun < LIMIT_S
            await eventually(waits(made, 0))
            await made.replica.cancel("holder")
            while (await post(http)).status_code != 200:  # 0.3 s may be short for a busy machine
                await asyncio.sleep(0.01)

    run(test(429, "no_free_slab", queue_timeout_s=0.3))
    run(test(504, "timeout", timeout_s=0.3))


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("session_id", [None, "s"])
def test_a_client_who_leaves_frees_its_place(
    session_id: str | None, cancels: bool, tiny_lm: Path
) -> None:
    async def test() -> None:
        async with one_slab(tiny_lm) as made:
            made.cancels = cancels
            await made.replica.start(ask("holder", None, "x", **ENDLESS))
            waiting = asyncio.ensure_future(made.client().answer(ask("gone", session_id, "ab")))
            await eventually(waits(made, 1))
            waiting.cancel()
            await eventually(waits(made, 0))
            await made.replica.cancel("holder")
            await eventually(lambda: not slabs(made.replica))

    run(test())


def test_a_waiting_stream_is_open_and_pinged(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_http_replies, "OPEN_AFTER_S", 0.1)

    async def test() -> None:
        async with one_slab(tiny_lm, ping_s=0.1) as made, web(made) as http:
            await made.replica.start(ask("holder", None, "x", **ENDLESS))
            sent: list[tuple[str, bytes]] = []
            body = {"prompt": "ab", "max_tokens": 3}
            call = asyncio.ensure_future(streamed(http, body, sent))
            await eventually(lambda: len(sent) > 3)
            assert sent[0][0] == "http.response.start"
            assert [data for _, data in sent[1:4]] == [PING] * 3
            assert not call.done()
            await made.replica.cancel("holder")
            await call
            assert sent[-2][1] == b"data: [DONE]\n\n"

    run(test())


def test_requests_of_several_slabs_take_all_or_none(tiny_lm: Path) -> None:
    """Two requests that each held one slab and waited for the other's would deadlock."""

    async def test() -> None:
        async with cluster(tiny_lm, sessions=3, max_choices=3, queue_timeout_s=20) as made:
            async with web(made) as http:
                mixed = (2, 3, 1, 2, 3, 2, 1, 3)
                replies = await asyncio.gather(*(post(http, n=n) for n in mixed))
            assert [reply.status_code for reply in replies] == [200] * len(mixed)
            assert [len(reply.json()["choices"]) for reply in replies] == list(mixed)
            await eventually(lambda: not slabs(made.replica))

    run(test())


def test_who_has_a_slab_does_not_wait_for_one(tiny_lm: Path, tmp_path: Path) -> None:
    async def test() -> None:
        settings = {"sessions": 2, "store": str(tmp_path)}
        async with cluster(tiny_lm, **settings) as made:
            replica = made.replica
            await say(replica, "here", "ab", max_tokens=1)
            await replica.start(ask("holder", "busy", "x", **ENDLESS))
            # The idle session makes room for one that waits, but not for two at once.
            two = asyncio.ensure_future(replica.start(ask("two", None, "x", n=2)))
            await eventually(waits(made, 1))
            assert await asyncio.wait_for(say(replica, "here", "cd", max_tokens=2), LIMIT_S)
            assert not two.done()
            await replica.cancel("holder")
            assert not isinstance(await two, ApiError)
            await read(replica, "two")

    run(test())


CHUNKS = 200


async def reading(made: Cluster, **body: Any) -> tuple[asyncio.Task[Any], list[int]]:
    """Returns a running request in the middle of a prompt of `CHUNKS`, and those that were read."""
    real, chunks = made.replica._engine.model.read_packed, list[int]()

    def slow(*args: Any) -> Any:
        chunks.append(0)
        time.sleep(0.05)
        return real(*args)

    made.replica._engine.model.read_packed = slow  # type: ignore[method-assign]
    client = made.client()

    async def ask_and_read() -> None:
        answer = client.open(ask("r", None, "ab" * 8 * CHUNKS, **body))
        try:
            async for _ in answer.pieces():
                continue
        finally:
            answer.close()

    call = asyncio.ensure_future(ask_and_read())
    await eventually(lambda: len(chunks) > 2)
    return call, chunks


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_a_prompt_is_not_read_for_a_client_who_left(n: int, cancels: bool, tiny_lm: Path) -> None:
    """Slabs are free after the chunk in progress."""

    async def test() -> None:
        async with cluster(tiny_lm) as made:
            made.cancels = cancels
            call, chunks = await reading(made, n=n)
            assert len(slabs(made.replica)) == n
            call.cancel()
            await eventually(lambda: not slabs(made.replica))
            assert len(chunks) < CHUNKS / 2

    run(test())


def test_several_answers_read_a_prompt_as_one_does(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, sessions=3, max_choices=3) as made, web(made) as http:
            prompt = "a prompt that is longer than the cache, " * 3
            one = (await post(http, prompt=prompt, max_tokens=9)).json()["choices"]
            three = (await post(http, prompt=prompt, max_tokens=9, n=3)).json()
            assert [choice["text"] for choice in three["choices"]] == [one[0]["text"]] * 3
            assert three["usage"]["prompt_tokens"] == len(prompt)

    run(test())
