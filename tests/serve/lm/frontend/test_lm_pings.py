"""Comments in the silences of a stream, which the real `openai` client must skip."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.lm.serving import Cluster, cluster, run, same_text, web
from helpers.lm.streamed import GREEDY, streamed
from helpers.waiting import eventually
from serve.lm.frontend import replies
from serve.lm.frontend.events import PING, event, with_pings

PING_S = 0.05


@pytest.mark.parametrize("pings", [0, 2])
def test_a_comment_is_sent_after_every_silence_and_only_then(pings: int) -> None:
    got: list[bytes] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"a"
        await eventually(lambda: got.count(PING) >= pings, every_s=0.0)
        yield b"b"

    async def test() -> None:
        async for data in with_pings(events(), 0.3):
            got.append(data)
        assert got == [b"a", *[PING] * pings, b"b"]

    run(test())


def test_what_the_events_raise_is_raised_and_they_are_closed() -> None:
    closed: list[str] = []

    async def fails() -> AsyncGenerator[bytes, None]:
        try:
            yield b"a"
            raise ValueError("a bug")
        finally:
            closed.append("fails")

    async def waits() -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.sleep(60)
            yield b"never"
        finally:
            closed.append("waits")

    async def test() -> None:
        with pytest.raises(ValueError, match="a bug"):
            _ = [data async for data in with_pings(fails(), 1)]
        silent = with_pings(waits(), 0.01)
        assert await anext(silent) == PING
        await silent.aclose()
        assert closed == ["fails", "waits"]

    run(test())


def test_a_comment_is_no_event_for_a_client_that_keeps_the_last_id() -> None:
    """The decoder of `openai`: an empty line after an `id` makes an event, data or not."""
    from openai._streaming import SSEDecoder

    wire = event({"n": 1}, 7) + PING + PING + event({"n": 2}, 8)
    got = list(SSEDecoder().iter_bytes(iter([wire])))
    assert [json.loads(each.data) for each in got] == [{"n": 1}, {"n": 2}]


@asynccontextmanager
async def official(
    http: httpx.AsyncClient,
) -> AsyncIterator[tuple[openai.AsyncOpenAI, list[bytes]]]:
    """OpenAI's client in front of the application, and the bytes of its replies."""
    bodies: list[bytes] = []

    async def keep(reply: httpx.Response) -> None:
        bodies.append(await reply.aread())

    http.event_hooks = {"response": [keep]}
    yield openai.AsyncOpenAI(base_url="http://lm/v1", api_key="x", http_client=http), bodies


def lag(made: Cluster, method: str, seconds: float) -> None:
    """Makes a method of the newest replica slow."""
    real = getattr(made.replica, method)

    async def late(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(seconds)
        return await real(*args, **kwargs)

    setattr(made.replica, method, late)


@pytest.mark.parametrize("session_id", [None, "s"])
def test_the_official_client_reads_over_pings_in_chats(
    session_id: str | None, tiny_lm: Path, tmp_path: Path
) -> None:
    async def test() -> None:
        settings = {"store": str(tmp_path), "ping_s": PING_S, "max_buffered": 4}
        async with (
            cluster(tiny_lm, **settings) as made,
            web(made) as http,
            official(http) as (client, bodies),
        ):
            lag(made, "take", 3 * PING_S)
            asked: Any = GREEDY | {"messages": [{"role": "user", "content": "hi"}]}
            asked |= {"max_tokens": 12, "extra_body": {"session_id": session_id}}
            text = ""
            async for chunk in await client.chat.completions.create(**asked, stream=True):
                text += chunk.choices[0].delta.content or ""
            assert bodies[-1].count(PING) >= 3
            assert PING + b"\n" not in bodies[-1]
            assert (b"\nid: " in bodies[-1]) == (session_id is not None)
            other = {"session_id": session_id and "other"}
            whole = await client.chat.completions.create(**asked | {"extra_body": other})
            assert text == whole.choices[0].message.content

    run(test())


def test_the_official_client_reads_over_a_lost_replica(tiny_lm: Path, tmp_path: Path) -> None:
    """The next one takes its time to take the session over: nothing but comments meanwhile."""

    async def test() -> None:
        settings = {"store": str(tmp_path), "ping_s": PING_S, "max_buffered": 4}
        async with (
            cluster(tiny_lm, **settings) as made,
            web(made) as http,
            official(http) as (client, bodies),
        ):
            taken = made.replica.take
            calls = 0

            async def lost(*args: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == 3:
                    made.add()
                    lag(made, "start", 12 * PING_S)
                return await taken(*args)

            made.replica.take = lost  # type: ignore[method-assign]
            asked: Any = GREEDY | {"prompt": "ab", "max_tokens": 30}
            session: Any = {"session_id": "s", "ignore_eos": True}
            chunks = [
                chunk
                async for chunk in await client.completions.create(
                    **asked, stream=True, extra_body=session
                )
            ]
            assert len(made.replicas) == 2
            assert bodies[-1].count(PING) >= 4
            text = "".join(chunk.choices[0].text for chunk in chunks)
            whole = await client.completions.create(**asked, extra_body={"ignore_eos": True})
            assert same_text(text, whole.choices[0].text)

    run(test())


def test_a_stream_that_has_not_begun_is_opened_and_pinged(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `start` waits for; what it then refuses is an event, for the status is sent."""
    monkeypatch.setattr(replies, "OPEN_AFTER_S", 0.1)

    async def test() -> None:
        async with cluster(tiny_lm, ping_s=PING_S) as made, web(made) as http:
            real, go_on = made.replica.start, asyncio.Event()

            async def late(*args: Any, **kwargs: Any) -> Any:
                await go_on.wait()
                return await real(*args, **kwargs)

            made.replica.start = late  # type: ignore[method-assign]

            async def pinged(**body: Any) -> bytes:
                """Returns the last part of a stream, for whose begin four pings are waited."""
                go_on.clear()
                sent: list[tuple[str, bytes]] = []
                call = asyncio.ensure_future(streamed(http, body, sent))
                await eventually(lambda: len(sent) > 4)
                assert sent[0][0] == "http.response.start"
                assert [data for _, data in sent[1:5]] == [PING] * 4
                go_on.set()
                await call
                return sent[-2][1]

            assert await pinged(prompt="ab", n=2, max_tokens=3) == b"data: [DONE]\n\n"
            assert b'"code":"session_not_found"' in await pinged(session_id="nobody")

            async def broken(start: Any) -> Any:
                raise RuntimeError("a secret")

            made.replica._scheduler.start = broken  # type: ignore[method-assign]
            failed = await pinged(prompt="ab")
            assert b'"code":"internal_error"' in failed
            assert b"secret" not in failed

    run(test())
