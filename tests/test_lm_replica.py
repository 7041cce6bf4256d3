"""The language model's replica without Ray: callers who go away, stores that fail, two owners."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from lm_serving import (
    BYTES,
    SPECIAL,
    Cluster,
    ask,
    cluster,
    eventually,
    load_ids,
    read,
    save_tiny_lm,
)
from lm_text_reference import greedy

from serve import lm_calls, lm_housekeeper, lm_shelf, segmented_log
from serve.chat import LanguageModel
from serve.lm_contract import Refused
from serve.session_store import SessionStore, StoredSession
from serve.token_log import LocalLog


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "tiny"
    path.mkdir()
    save_tiny_lm(path)
    return path


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def say(replica: LanguageModel, session_id: str, prompt: str, **more: Any) -> list[int]:
    """A whole turn."""
    start = ask(uuid.uuid4().hex, session_id, prompt, **more)
    started = await replica.start(start)
    assert not isinstance(started, Refused), started
    tokens, reason = await read(replica, start.request_id)
    assert reason == "length"
    return tokens


def slabs(replica: LanguageModel) -> set[str]:
    return set(replica._engine.sessions())


def slow(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
    real = getattr(owner, name)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, slowed)


CALLS: dict[str, Callable[[LanguageModel], Any]] = {
    "start": lambda replica: replica.start(ask("gone", "new", "hello", max_tokens=None)),
    "start again": lambda replica: replica.start(ask("gone", "old", "hello", max_tokens=None)),
    "start without a session": lambda replica: replica.start(
        ask("gone", None, "hello", n=2, max_tokens=None)
    ),
    "create": lambda replica: replica.create("new", None, tuple(load_ids("pin")), None, "gone"),
    "fork": lambda replica: replica.fork("old", "new", "gone"),
    "restore": lambda replica: replica.restore("old"),
    "delete": lambda replica: replica.delete("old"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_caller_who_goes_away_breaks_nothing(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever moment: no slab is lost, no session is stuck, nothing goes on generating."""

    async def test() -> None:
        async with cluster(folder, store=str(tmp_path)) as made:
            replica = made.replica
            for method in ("export", "close", "submit", "restore"):
                slow(monkeypatch, replica._engine, method, 0.004)
            slow(monkeypatch, StoredSession, "begin_turn", 0.004)
            for moment in (0.0, 0.004, 0.009, 0.015):
                for other in ("a", "b", "old"):
                    await say(replica, other, "x", max_tokens=1)  # takes all slabs, twice over
                call = asyncio.ensure_future(CALLS[name](replica))
                await asyncio.sleep(moment)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                if not call.cancelled():  # it had been quicker
                    await replica.cancel("gone")
                await eventually(lambda: not lm_calls._running and not len(replica._desk))
                assert slabs(replica) == {held.session_id for held in replica._sessions.held()}
                for other in ("a", "b", "old", "new"):
                    await say(replica, other, "y", max_tokens=1)
                await replica.delete("new")

    run(test())


def test_a_caller_who_stops_waiting_wants_no_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit in the ingress does not cancel the replica's method; it says so instead."""

    async def test() -> None:
        async with cluster(folder, store=str(tmp_path)) as made:
            made.cancels = False
            slow(monkeypatch, made.replica._engine, "submit", 0.2)
            start = ask("late", "s", "hello", max_tokens=None)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await made.client().answer(start)
            await eventually(lambda: made.replica._sessions.get("s") is not None)
            await eventually(lambda: not len(made.replica._desk), 2)
            state = await made.replica.describe_session("s")
            assert not isinstance(state, Refused)
            assert state.status == "idle"

    run(test())


def test_locks_are_as_many_as_are_in_use(folder: Path) -> None:
    async def test() -> None:
        async with cluster(folder) as made:
            for number in range(20):
                assert isinstance(await made.replica.describe_session(f"no-{number}"), Refused)
                assert isinstance(await made.replica.delete(f"no-{number}"), Refused)
                await say(made.replica, "s", "x", max_tokens=1)
            await asyncio.sleep(0)
            gc.collect()
            assert len(made.replica._sessions._locks) == len(made.replica._desk.locks) == 0

    run(test())


def test_one_failure_does_not_stop_the_housekeeper(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_housekeeper, "KEEP_HOUSE_S", 0.02)
    real = StoredSession.save_snapshot

    def fail(self: StoredSession, *args: Any) -> None:
        if self.spec.session_id == "a":
            raise OSError("no space left on device")
        real(self, *args)

    monkeypatch.setattr(StoredSession, "save_snapshot", fail)

    async def test() -> None:
        changes = {"snapshot_every": 5, "reader_timeout_s": 0.2}
        async with cluster(folder, store=str(tmp_path), sessions=3, **changes) as made:
            replica = made.replica
            for name in ("a", "b"):
                await say(replica, name, "hello", max_tokens=5)
            await replica.start(ask("unread", "c", "hello", max_tokens=None))
            await eventually(lambda: bool(replica._sessions.get("b").snapshot_at))  # type: ignore[union-attr]
            await eventually(lambda: not len(replica._desk))
            replica.check_health()
            monkeypatch.setattr(StoredSession, "save_snapshot", real)
            await eventually(lambda: bool(replica._sessions.get("a").snapshot_at))  # type: ignore[union-attr]
            replica._housekeeper._task.cancel()
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="housekeeper"):
                replica.check_health()

    run(test())


@pytest.mark.parametrize("how", ["evicted", "snapshot", "housekeeper"])
def test_a_replica_that_lost_a_session_writes_no_snapshot_of_it(
    how: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_housekeeper, "KEEP_HOUSE_S", 0.02)

    async def test() -> None:
        async with cluster(folder, store=str(tmp_path), snapshot_every=8) as made:
            old = made.replica
            first = await say(old, "s", "ab", max_tokens=3)
            held = old._sessions.get("s")
            assert held is not None
            # The old replica generates, paused by its reader; another one takes the session over.
            await old.start(ask("slow", "s", "", max_tokens=None))
            await eventually(lambda: held.log.position == 5 + made.settings.max_buffered)
            new = made.add()
            await new.start(ask("resume", "s", "", resume_at=5, max_tokens=90))
            second, reason = await read(new, "resume")
            assert reason == "length"
            await old.take("slow", 64, 0.2)  # makes room: it goes on, and cannot log that
            await eventually(lambda: held.failure is not None)
            if how == "evicted":
                await old.cancel("slow")
                for other in ("x", "y"):
                    await say(old, other, "x", max_tokens=1)
            elif how == "snapshot":
                with pytest.raises(Exception, match="cannot be written"):
                    await old._sessions.snapshot(held)
            else:
                await asyncio.sleep(0.2)
            await new.snapshot("s")
            third = made.add()
            rest = await say(third, "s", "", max_tokens=10)
            assert first + second + rest == greedy(folder, "ab", 103)

    run(test())


def test_a_session_whose_time_is_over_goes_without_being_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_housekeeper, "KEEP_HOUSE_S", 0.02)
    monkeypatch.setattr(lm_housekeeper, "EXPIRE_STORED_S", 0.1)
    monkeypatch.setattr(lm_shelf, "ELSEWHERE_S", 0.8)

    async def test() -> None:
        async with cluster(folder, store=str(tmp_path)) as made:
            await made.replica.create("brief", None, (), 0.3, "r")
            for name in ("a", "b"):  # take its slab
                await say(made.replica, name, "x", max_tokens=1)
            assert "brief" not in slabs(made.replica)
            assert (tmp_path / "brief").exists()
            await eventually(lambda: not (tmp_path / "brief").exists())
            assert (tmp_path / "a").exists()  # a day's time
            # One that another replica has had last may still be in use there.
            other = LanguageModel(made.settings, made)
            made.replicas.insert(0, other)
            await other.create("theirs", None, (), 0.3, "r")
            other._housekeeper._task.cancel()
            await asyncio.sleep(0.7)
            assert (tmp_path / "theirs").exists()
            await eventually(lambda: not (tmp_path / "theirs").exists())

    run(test())


def test_an_idle_session_in_memory_ends_after_its_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_housekeeper, "KEEP_HOUSE_S", 0.02)

    async def test() -> None:
        async with cluster(folder, session_ttl_s=0.3) as made:
            await say(made.replica, "s", "x", max_tokens=1)
            await made.replica.start(ask("r", "busy", "x", max_tokens=None))
            await eventually(lambda: "s" not in slabs(made.replica))
            assert "busy" in slabs(made.replica)  # it generates
            assert isinstance(await made.replica.describe_session("s"), Refused)

    run(test())


async def pull(answer: Any) -> list[int]:
    return [t.token async for batch in answer.pieces() for piece in batch for t in piece.tokens]


async def drain(pieces: Any) -> None:
    async for batch in pieces:
        for piece in batch:
            if piece.end is not None and piece.end.reason == "cancelled":
                raise AssertionError("another request went on")  # as the ingress tells its client


def test_a_reader_who_was_replaced_does_not_come_back(folder: Path, tmp_path: Path) -> None:
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
        assert there == greedy(folder, "ab", 63)[3:]
        state = await made.replica.describe_session(name)
        assert not isinstance(state, Refused)
        assert state.stream_position < 2 + 3 + 60 + 64 + 1

    async def tests() -> None:
        async with cluster(folder, store=str(tmp_path)) as made:
            await test(made, finish=False, move=False)
            await test(made, finish=True, move=False)
            await test(made, finish=False, move=True)
            await test(made, finish=True, move=True)

    run(tests())


def test_a_call_whose_reply_was_lost_has_succeeded(folder: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(folder, store=str(tmp_path)) as made:
            client = made.client()
            made.dies_after = {"create", "fork", "delete", "start"}
            state = await client.call("s", "create", "s", None, tuple(load_ids("pin")), None, "r1")
            assert state.stream_position == 3
            with pytest.raises(Exception, match="exists already"):
                await client.call("s", "create", "s", None, (), None, "r2")
            answer = await client.answer(ask("r3", "s", "ab", max_tokens=9))
            assert await pull(answer) == greedy(folder, "pinab", 9, sinks=3)
            twin = await client.call("s", "fork", "s", "twin", "r4")
            assert twin.stream_position == 3 + 2 + 9
            with pytest.raises(Exception, match="exists already"):
                await client.call("s", "fork", "s", "twin", "r5")
            await client.delete("twin")
            with pytest.raises(Exception, match="does not exist"):
                await client.delete("twin")

    run(test())


def test_two_forks_to_one_name(folder: Path, tmp_path: Path) -> None:
    async def test(store: str | None) -> None:
        async with cluster(folder, store=store, sessions=4) as made:
            for name in ("a", "b"):
                await say(made.replica, name, name, max_tokens=3)
            calls = (made.replica.fork(name, "twin", f"from-{name}") for name in ("a", "b"))
            one, other = await asyncio.wait_for(asyncio.gather(*calls), 10)
            assert not isinstance(one, Refused)
            assert isinstance(other, Refused)
            assert (other.status, other.code) == (409, "session_exists")
            crossed = made.replica.fork("a", "b", "r"), made.replica.fork("b", "a", "r")
            for refused in await asyncio.wait_for(asyncio.gather(*crossed), 10):
                assert isinstance(refused, Refused)

    run(test(None))
    run(test(str(tmp_path)))


def test_a_pinned_prefix_is_durable_when_its_session_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmented_log, "GATHER_S", 0.2)

    async def test() -> None:
        uri = f"memory://{uuid.uuid4().hex}"
        async with cluster(folder, store=uri) as made:
            await made.replica.create("s", None, tuple(load_ids("pinned")), None, "r")
            assert SessionStore(uri, "any").position("s") == 6

    run(test())


def test_a_log_that_cannot_be_written_stops_what_it_does_not_have(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with cluster(folder, store=str(tmp_path)) as made:
            first = await say(made.replica, "s", "ab", max_tokens=5)

            def full(*_: object) -> None:
                raise OSError("no space left on device")

            monkeypatch.setattr(LocalLog, "append", full)
            refused = await made.replica.start(ask("r", "s", "cd", max_tokens=None))
            assert isinstance(refused, Refused)
            assert (refused.status, refused.code) == (503, "log_failed")
            await eventually(lambda: not made.replica._engine._sessions["s"].busy)
            monkeypatch.undo()
            # As if the refused request had never been: what was not logged is not in the stream.
            rest = await say(made.replica, "s", "", max_tokens=5)
            assert first + rest == greedy(folder, "ab", 10)

    run(test())


def test_min_tokens_hold_in_sessions_and_after_a_resume(folder: Path, tmp_path: Path) -> None:
    tokens = greedy(folder, "ab", 60)
    # A character of one byte that comes early, and again after the ten tokens that must come.
    early = next(token for token in tokens[3:10] if token in tokens[10:] and is_ascii(token))
    stop, later = sorted(BYTES)[early - len(SPECIAL)], tokens.index(early, 10)

    async def test() -> None:
        async with cluster(folder, store=str(tmp_path)) as made:
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


def test_resuming_far_back_reads_the_log_as_it_is_shown(folder: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(folder, store=str(tmp_path), prefill_chunk=256) as made:
            replica = made.replica
            await say(replica, "s", "ab", max_tokens=1)
            held = replica._sessions.get("s")
            assert held is not None
            logged = [3 + number % 200 for number in range(5_000)]
            await replica._thread.call(lambda: replica._engine.extend("s", logged))
            await replica.start(ask("r", "s", "", resume_at=3, max_tokens=5_020))
            running = replica._desk.get("r")
            assert running is not None
            (source,) = running.sources
            got: list[int] = []
            while len(got) < 5_020:
                taken = await replica.take("r", 64, 1.0)
                got += [t.token for piece in taken.pieces for t in piece.tokens]  # type: ignore[union-attr]
                assert len(source._ready) <= 256
                # Nothing is generated before the reader has come so far.
                assert (source._generation is None) == (len(got) <= 5_000)
            assert got[:5_000] == logged
            # The session is not generating: another request resumes it from there.
            await replica.start(ask("q", "s", "", resume_at=3 + 5_000, max_tokens=20))
            again, _ = await read(replica, "q")
            assert again == got[5_000:]

    run(test())
