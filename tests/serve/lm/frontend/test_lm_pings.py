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
from helpers.lm.timed import GREEDY, timed
from serve.lm.frontend import replies
from serve.lm.frontend.events import PING, event, with_pings

PING_S = 0.05


def quick(seconds: float) -> Any:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"a"
        await asyncio.sleep(seconds)
        yield b"b"

    return events()


@pytest.mark.parametrize(("seconds", "pings"), [(0.0, 0), (0.25, 2)])
def test_a_comment_is_sent_after_every_silence_and_only_then(seconds: float, pings: int) -> None:
    async def test() -> None:
        got = [data async for data in with_pings(quick(seconds), 0.1)]
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
                    lag(made, "start", 6 * PING_S)
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
            lag(made, "start", 0.6)
            sent = await timed(http, {"prompt": "ab", "n": 2, "max_tokens": 3})
            assert sent[0][1] == "http.response.start"
            assert sent[0][0] < 0.5
            assert [data for _, _, data in sent[1:5]] == [PING] * 4
            assert sent[-2][2] == b"data: [DONE]\n\n"
            late = await timed(http, {"session_id": "nobody"})
            assert b'"code":"session_not_found"' in late[-2][2]

            async def broken(start: Any) -> Any:
                raise RuntimeError("a secret")

            made.replica._scheduler.start = broken  # type: ignore[method-assign]
            failed = await timed(http, {"prompt": "ab"})
            assert b'"code":"internal_error"' in failed[-2][2]
            assert b"secret" not in failed[-2][2]

    run(test())
