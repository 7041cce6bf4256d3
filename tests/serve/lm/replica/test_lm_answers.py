"""Answers of the language model's replica: lost replies, other readers, resumed streams."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from pathlib import Path
from typing import Any

import pytest

from helpers.lm.serving import BYTES, SPECIAL, Cluster, ask, cluster, load_ids, read, run, say
from helpers.lm.text_reference import greedy
from serve.ingress.errors import ApiError
from serve.lm.contract import Feed


async def pull(answer: Any) -> list[int]:
    return [t.token async for batch in answer.pieces() for piece in batch for t in piece.tokens]


async def drain(pieces: Any) -> list[int]:
    tokens: list[int] = []
    async for batch in pieces:
        for piece in batch:
            tokens += [token.token for token in piece.tokens]
            if piece.end is not None and piece.end.reason == "cancelled":
                raise AssertionError("another request went on")  # as the ingress tells its client
    return tokens


def test_a_reader_who_was_replaced_does_not_come_back(tiny_lm: Path, tmp_path: Path) -> None:
    async def test(made: Cluster, *, finish: bool, move: bool) -> None:
        client, name = made.client(), uuid.uuid4().hex
        first = await client.answer(ask(uuid.uuid4().hex, name, "ab", max_tokens=80))
        pieces = first.pieces()
        got: list[int] = []
        while len(got) < 5:
            got += [t.token for piece in await anext(pieces) for t in piece.tokens]
        if move:  # the ring has changed: the session is another replica's now
            made.add()
        resumed = ask(uuid.uuid4().hex, name, "", resume_at=2 + 3, max_tokens=60)
        second = await client.answer(resumed)
        rest = second.pieces()
        there: list[int] = []
        if finish:
            there = await pull(second)
        with pytest.raises(Exception, match=r"another request went on|nobody read"):
            await drain(pieces)
        if not finish:
            there = [t.token async for batch in rest for p in batch for t in p.tokens]
        assert there == greedy(tiny_lm, "ab", 63)[3:]
        state = await made.replica.describe_session(name)
        assert not isinstance(state, ApiError)
        assert state.stream_position < 2 + 3 + 60 + 64 + 1

    async def tests() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made:
            await test(made, finish=False, move=False)
            await test(made, finish=True, move=False)
            await test(made, finish=False, move=True)
            await test(made, finish=True, move=True)

    run(tests())


def test_a_call_whose_reply_was_lost_has_succeeded(tiny_lm: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made:
            client = made.client()
            made.dies_after = {"create", "fork", "delete", "start"}
            state = await client.call("s", "create", "s", None, tuple(load_ids("pin")), None, "r1")
            assert state.stream_position == 3
            with pytest.raises(Exception, match="exists already"):
                await client.call("s", "create", "s", None, (), None, "r2")
            answer = await client.answer(ask("r3", "s", "ab", max_tokens=9))
            assert await pull(answer) == greedy(tiny_lm, "pinab", 9, sinks=3)
            twin = await client.call("s", "fork", "s", "twin", "r4")
            assert twin.stream_position == 3 + 2 + 9
            with pytest.raises(Exception, match="exists already"):
                await client.call("s", "fork", "s", "twin", "r5")
            await client.delete("twin")
            with pytest.raises(Exception, match="does not exist"):
                await client.delete("twin")

    run(test())


def test_a_character_that_the_prompt_began_is_whole_after_a_resume(
    tiny_lm: Path, tmp_path: Path
) -> None:
    *first, last = load_ids("🎉")

    async def texts(replica: Any, request_id: str) -> str:
        taken = await replica.take(request_id, 64, 1.0)
        return "".join(token.text for piece in taken.pieces for token in piece.tokens)

    async def test(store: str | None) -> None:
        async with cluster(tiny_lm, store=store) as made:
            options = {"max_tokens": 1, "logit_bias": {last: 100.0}}
            begun = ask("r", "s", "", **options)
            feed = Feed(start=tuple(first), follow=tuple(first))
            await made.replica.start(dataclasses.replace(begun, feeds=(feed,)))
            assert await texts(made.replica, "r") == "🎉"
            if store is not None:
                await made.replica.start(ask("q", "s", "", resume_at=3, **options))
                assert await texts(made.replica, "q") == "🎉"

    run(test(str(tmp_path)))
    run(test(None))


def test_what_is_stored_nowhere_is_lost_with_its_replica(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made:
            for session_id in (None, "s"):
                start = ask(uuid.uuid4().hex, session_id, "ab", max_tokens=None)
                answer = await made.client().answer(start)
                pieces = answer.pieces()
                await anext(pieces)
                made.add()
                with pytest.raises(ApiError) as caught:
                    await drain(pieces)
                assert (caught.value.status, caught.value.code) == (503, "replica_lost")

    run(test())


def test_a_stream_waits_for_a_slab_where_its_replica_is_lost(tiny_lm: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path), sessions=1, max_choices=1) as made:
            answer = await made.client().answer(ask("r", "s", "ab", max_tokens=90))
            pieces = answer.pieces()
            got = [t.token for piece in await anext(pieces) for t in piece.tokens]
            other = made.add()
            await other.start(ask("q", "t", "x", max_tokens=None))  # has the only slab
            rest = asyncio.ensure_future(drain(pieces))
            await asyncio.sleep(0.5)
            assert not rest.done()
            await other.cancel("q")
            assert got + await rest == greedy(tiny_lm, "ab", 90)

    run(test())


def test_min_tokens_hold_in_sessions_and_after_a_resume(tiny_lm: Path, tmp_path: Path) -> None:
    tokens = greedy(tiny_lm, "ab", 60)
    # A character of one byte that comes early, and again after the ten tokens that must come.
    early = next(token for token in tokens[3:10] if token in tokens[10:] and is_ascii(token))
    stop, later = sorted(BYTES)[early - len(SPECIAL)], tokens.index(early, 10)

    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made:
            options = {"max_tokens": 60, "min_tokens": 10, "stop": (stop,)}
            for session_id in (None, "s"):
                request = ask(uuid.uuid4().hex, session_id, "ab", **options)
                await made.replica.start(request)
                got, reason = await read(made.replica, request.request_id)
                assert (got, reason) == (tokens[: later + 1], "stop"), session_id
            # The replica is lost after three tokens: seven more are none that may end the answer.
            answer = await made.client().answer(ask("r", "t", "ab", **options))
            pieces, got = answer.pieces(), []
            async for batch in pieces:
                got += [t.token for piece in batch for t in piece.tokens]
                if len(got) >= 3 and len(made.replicas) == 1:
                    made.add()
            assert got == tokens[: later + 1]

    run(test())


def is_ascii(token: int) -> bool:
    return token >= len(SPECIAL) and sorted(BYTES)[token - len(SPECIAL)].isascii()


def test_resuming_far_back_reads_the_log_as_it_is_shown(tiny_lm: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path), prefill_chunk=256) as made:
            replica = made.replica
            await say(replica, "s", "ab", max_tokens=1)
            session = replica._sessions.get("s")
            assert session is not None
            logged = [3 + number % 200 for number in range(5_000)]
            await replica._thread.call(lambda: replica._engine.extend("s", logged))
            await replica.start(ask("r", "s", "", resume_at=3, max_tokens=5_020))
            running = replica._active.get("r")
            assert running is not None
            (choice,) = running.choices
            got: list[int] = []
            while len(got) < 5_020:
                taken = await replica.take("r", 64, 1.0)
                got += [t.token for piece in taken.pieces for t in piece.tokens]  # type: ignore[union-attr]
                assert len(choice._ready) <= 256
                # Nothing is generated before the reader has come so far.
                assert (choice._generation is None) == (len(got) <= 5_000)
            assert got[:5_000] == logged
            # The session is not generating: another request resumes it from there.
            await replica.start(ask("q", "s", "", resume_at=3 + 5_000, max_tokens=20))
            again, _ = await read(replica, "q")
            assert again == got[5_000:]

    run(test())
