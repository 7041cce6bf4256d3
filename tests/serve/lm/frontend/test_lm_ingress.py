"""The language model's HTTP application in front of a replica, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.lm.serving import MODEL, Cluster, cluster, events, run, same_text, web
from helpers.waiting import LIMIT_S, eventually
from serve.lm.frontend.client import LMClient
from serve.lm.replica import maintenance

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}


async def stream(http: httpx.AsyncClient, **body: Any) -> list[tuple[int | None, Any]]:
    reply = await http.post("/v1/completions", json=GREEDY | {"stream": True} | body)
    assert reply.status_code == 200, reply.text
    return list(events(iter(reply.text.splitlines())))


@pytest.mark.parametrize("session_id", [None, "s"])
def test_after_a_5xx_a_session_s_prompt_is_not_to_be_sent_again(
    session_id: str | None, tiny_lm: Path, tmp_path: Path
) -> None:
    """OpenAI's clients repeat a 5xx: the prompt would be in the stream twice."""

    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path), timeout_s=2) as made, web(made) as http:
            body = GREEDY | {"prompt": "a", "max_tokens": 4}
            if session_id is not None:
                body["session_id"] = session_id
            replica = made.replica
            real = replica._scheduler.start

            async def late(start: Any) -> Any:
                await asyncio.sleep(LIMIT_S)
                return await real(start)

            replica._scheduler.start = late  # type: ignore[method-assign]
            slow = await http.post("/v1/completions", json=body)
            assert (slow.status_code, slow.json()["error"]["code"]) == (504, "timeout")

            async def broken(start: Any) -> Any:
                raise RuntimeError("a bug")

            replica._scheduler.start = broken  # type: ignore[method-assign]
            failed = await http.post("/v1/completions", json=body)
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
            for reply in (slow, failed):
                again = reply.headers.get("x-should-retry")
                assert again == (None if session_id is None else "false")

    run(test())


def test_a_long_stream_ends_where_it_can_be_resumed(tiny_lm: Path, tmp_path: Path) -> None:
    """The replica is up to 64 tokens ahead of what was sent; they are not lost."""

    async def test() -> None:
        limit = 3_000
        settings = {"store": str(tmp_path), "max_stream_bytes": limit}
        async with cluster(tiny_lm, max_reply_tokens=9_999, **settings) as made, web(made) as http:
            real = made.replica.take

            async def slow(*args: Any) -> Any:
                await asyncio.sleep(0.02)  # the engine gets ahead of its reader
                return await real(*args)

            made.replica.take = slow  # type: ignore[method-assign]
            text, position, pieces = "", None, 0
            body: dict[str, Any] = {"prompt": "ab", "session_id": "s"}
            while pieces < 3:
                data = await stream(http, max_tokens=None, **body)
                *chunks, (last_id, last), (_, done) = data
                text += "".join(chunk["choices"][0]["text"] for _, chunk in chunks)
                assert done == "[DONE]"
                assert last["choices"][0]["finish_reason"] == "length"
                assert last["choices"][0]["stop_reason"] == "max_stream_bytes"
                shown = [seen for seen, _ in chunks if seen is not None]
                assert last_id == (shown[-1] if shown else position)
                position, pieces = last_id, pieces + 1
                body = {"session_id": "s", "resume_at": position}
            assert position is not None
            whole = await http.post(
                "/v1/completions", json=GREEDY | {"prompt": "ab", "max_tokens": position - 2}
            )
            assert same_text(text, whole.json()["choices"][0]["text"])

    run(test())


def test_a_long_stream_closes_every_choice_and_counts(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, max_stream_bytes=3_000) as made, web(made) as http:
            usage = {"include_usage": True}
            data = await stream(http, prompt="ab", n=2, max_tokens=None, stream_options=usage)
            ends = {
                chunk["choices"][0]["index"]: chunk["choices"][0]["stop_reason"]
                for _, chunk in data[:-1]
                if chunk["choices"] and chunk["choices"][0]["finish_reason"]
            }
            assert ends == {0: "max_stream_bytes", 1: "max_stream_bytes"}
            assert data[-2][1]["usage"]["completion_tokens"] > 0
            assert data[-1][1] == "[DONE]"
            await eventually(lambda: not made.replica._engine.sessions())

    run(test())


def test_a_client_who_leaves_before_the_first_event(tiny_lm: Path) -> None:
    """The reply's head finds nobody: no event is ever asked for, and still nothing goes on."""

    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            app = http._transport.app  # type: ignore[attr-defined]
            body = json.dumps(GREEDY | {"prompt": "a", "stream": True, "max_tokens": None})
            headers = [(b"content-type", b"application/json")]
            scope = {
                **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}},
                **{"method": "POST", "path": "/v1/completions", "raw_path": b"", "scheme": "http"},
                **{"query_string": b"", "root_path": "", "headers": headers},
            }
            sent: list[str] = []

            async def receive() -> Any:
                return {"type": "http.request", "body": body.encode(), "more_body": False}

            async def send(message: Any) -> None:
                sent.append(message["type"])
                raise OSError("the client is gone")

            with contextlib.suppress(Exception):
                await app(scope, receive, send)
            assert sent[0] == "http.response.start"
            await eventually(lambda: not made.replica._engine.sessions())

    run(test())


def test_a_generation_whose_ingress_died_ends_and_is_resumed(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads it and nobody can cancel it: the replica itself gives its reader up."""
    monkeypatch.setattr(maintenance, "MAINTENANCE_S", 0.02)
    monkeypatch.setattr(LMClient, "cancel", lambda *_: None)  # the dead do not cancel

    async def test() -> None:
        settings = {"store": str(tmp_path), "reader_timeout_s": 2, "max_stream_bytes": 3_000}
        async with cluster(tiny_lm, **settings) as made, web(made) as http:
            data = await stream(http, prompt="ab", session_id="s", max_tokens=None)
            text = "".join(chunk["choices"][0]["text"] for _, chunk in data[:-1])
            position = data[-2][0]
            assert position is not None
            state = (await http.get("/v1/sessions/s")).json()
            assert (state["status"], len(made.replica._active)) == ("generating", 1)
            await eventually(lambda: not len(made.replica._active))
            assert (await http.get("/v1/sessions/s")).json()["status"] == "idle"
            resume = GREEDY | {"session_id": "s", "resume_at": position, "max_tokens": 9}
            rest = (await http.post("/v1/completions", json=resume)).json()["choices"][0]["text"]
            whole = GREEDY | {"prompt": "ab", "max_tokens": position - 2 + 9}
            reply = await http.post("/v1/completions", json=whole)
            assert same_text(text + rest, reply.json()["choices"][0]["text"])

    run(test())


def test_a_fork_s_name_may_come_in_pieces(tiny_lm: Path) -> None:
    async def body() -> Any:
        yield b'{"session_id":'
        yield b' "twin"}'

    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            await http.post("/v1/sessions", json={"session_id": "s", "pin_prefix": "ab"})
            headers = {"content-type": "application/json"}
            forked = await http.post("/v1/sessions/s/fork", content=body(), headers=headers)
            assert (forked.status_code, forked.json()["id"]) == (201, "twin")
            await http.delete("/v1/sessions/twin")
            unnamed = await http.post("/v1/sessions/s/fork")
            assert unnamed.status_code == 201
            assert unnamed.json()["id"].startswith("session-")

    run(test())


def test_offsets_belong_to_their_choice(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            body = GREEDY | {"prompt": "ab", "max_tokens": 5, "logprobs": 1}
            one = (await http.post("/v1/completions", json=body)).json()["choices"]
            two = (await http.post("/v1/completions", json=body | {"n": 2})).json()["choices"]
            offsets = one[0]["logprobs"]["text_offset"]
            assert offsets[0] == 0
            assert [choice["logprobs"]["text_offset"] for choice in two] == [offsets, offsets]

    run(test())


def test_usage_after_a_failover_is_that_of_the_request(tiny_lm: Path, tmp_path: Path) -> None:
    async def test(made: Cluster, http: httpx.AsyncClient) -> None:
        real = made.replica.take
        calls = 0

        async def lost(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                made.add()
            return await real(*args)

        made.replica.take = lost  # type: ignore[method-assign]
        body = GREEDY | {"prompt": "ab", "max_tokens": 100, "session_id": uuid.uuid4().hex}
        reply = (await http.post("/v1/completions", json=body)).json()
        assert len(made.replicas) == 2
        assert reply["usage"]["prompt_tokens"] == 2
        assert reply["usage"]["completion_tokens"] == 100
        whole = await http.post("/v1/completions", json=body | {"session_id": None})
        assert same_text(reply["choices"][0]["text"], whole.json()["choices"][0]["text"])

    async def tests() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made, web(made) as http:
            await test(made, http)

    run(tests())


def test_a_long_prompt_does_not_hold_up_the_others(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tokenized once, and not in the loop that serves everybody."""
    seen: list[str] = []
    main, go_on = threading.current_thread(), threading.Event()

    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            tokenizer_type = type(made.replica._tokenizer)
            real = tokenizer_type.encode

            def slow(self: Any, text: str, **how: Any) -> list[int]:
                seen.append(text)
                assert threading.current_thread() is not main
                assert go_on.wait(LIMIT_S)
                return real(self, text, **how)

            monkeypatch.setattr(tokenizer_type, "encode", slow)
            body = GREEDY | {"prompt": "ab", "max_tokens": 1}
            call = asyncio.ensure_future(http.post("/v1/completions", json=body))
            await eventually(lambda: seen)
            assert (await http.get("/healthz")).status_code == 200
            assert not call.done()
            go_on.set()
            assert (await call).status_code == 200
            assert seen == ["ab"]

    run(test())
