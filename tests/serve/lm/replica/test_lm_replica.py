"""The language model's replica without Ray: callers who go away, stores that fail, two owners."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.lm.serving import ask, cluster, load_ids, read, run, say, slabs, slow
from helpers.lm.text_reference import greedy
from helpers.waiting import LIMIT_S, eventually
from serve.ingress.errors import ApiError
from serve.lm.replica import maintenance, stored_sessions, tasks
from serve.lm.replica.language_model import LanguageModel
from serve.lm.store import segmented_log
from serve.lm.store.session_store import SessionStore, StoredSession
from serve.lm.store.token_log import LocalLog

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
    name: str, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that is, no slab is lost, no session is stuck and nothing goes on generating."""

    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made:
            replica = made.replica
            for method in ("export", "close", "submit", "restore"):
                slow(monkeypatch, replica._engine, method, 0.004)
            slow(monkeypatch, StoredSession, "begin_turn", 0.004)
            for moment in (0.0, 0.004, 0.012):
                for other in ("a", "b", "old"):
                    await say(replica, other, "x", max_tokens=1)  # takes all slabs, twice over
                call = asyncio.ensure_future(CALLS[name](replica))
                await asyncio.sleep(moment)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                if not call.cancelled():  # it had been quicker
                    await replica.cancel("gone")
                await eventually(lambda: not tasks._running and not len(replica._active))
                assert slabs(replica) == {
                    session.session_id for session in replica._sessions.resident()
                }
                for other in ("a", "b", "old", "new"):
                    await say(replica, other, "y", max_tokens=1)
                await replica.delete("new")

    run(test())


def test_a_caller_who_stops_waiting_wants_no_answer(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit in the ingress does not cancel the replica's method; it calls `cancel`."""

    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made:
            made.cancels = False
            slow(monkeypatch, made.replica._engine, "submit", 0.2)
            put, begun = made.replica._active.put, asyncio.Event()

            def watched(*args: Any) -> None:
                put(*args)
                begun.set()

            monkeypatch.setattr(made.replica._active, "put", watched)
            start = ask("late", "s", "hello", max_tokens=None)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await made.client().answer(start)
            await begun.wait()
            await eventually(lambda: not len(made.replica._active))
            state = await made.replica.describe_session("s")
            assert not isinstance(state, ApiError)
            assert state.status == "idle"

    run(test())


def test_locks_are_as_many_as_are_in_use(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made:
            for number in range(20):
                assert isinstance(await made.replica.describe_session(f"no-{number}"), ApiError)
                assert isinstance(await made.replica.delete(f"no-{number}"), ApiError)
                await say(made.replica, "s", "x", max_tokens=1)
            await asyncio.sleep(0)
            gc.collect()
            assert len(made.replica._sessions._locks) == len(made.replica._active.locks) == 0

    run(test())


def test_one_failure_does_not_stop_maintenance(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "MAINTENANCE_S", 0.02)
    real = StoredSession.save_snapshot

    def fail(self: StoredSession, *args: Any) -> None:
        if self.spec.session_id == "a":
            raise OSError("no space left on device")
        real(self, *args)

    monkeypatch.setattr(StoredSession, "save_snapshot", fail)

    async def test() -> None:
        changes = {"snapshot_every": 5, "reader_timeout_s": 1.0}
        async with cluster(tiny_lm, store=str(tmp_path), sessions=3, **changes) as made:
            replica = made.replica
            for name in ("a", "b"):
                await say(replica, name, "hello", max_tokens=5)
            await replica.start(ask("unread", "c", "hello", max_tokens=None))
            await eventually(lambda: bool(replica._sessions.get("b").snapshot_at))  # type: ignore[union-attr]
            await eventually(lambda: not len(replica._active))
            replica.check_health()
            monkeypatch.setattr(StoredSession, "save_snapshot", real)
            await eventually(lambda: bool(replica._sessions.get("a").snapshot_at))  # type: ignore[union-attr]
            replica._maintenance._task.cancel()
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="maintenance"):
                replica.check_health()

    run(test())


@pytest.mark.parametrize("how", ["evicted", "snapshot", "maintenance"])
def test_a_replica_that_lost_a_session_writes_no_snapshot_of_it(
    how: str, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "MAINTENANCE_S", 0.02)

    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path), snapshot_every=8) as made:
            old = made.replica
            first = await say(old, "s", "ab", max_tokens=3)
            session = old._sessions.get("s")
            assert session is not None
            # The old replica generates, paused by its reader; another one takes the session over.
            await old.start(ask("slow", "s", "", max_tokens=None))
            await eventually(lambda: session.log.position == 5 + made.settings.max_buffered)
            new = made.add()
            await new.start(ask("resume", "s", "", resume_at=5, max_tokens=90))
            second, reason = await read(new, "resume")
            assert reason == "length"
            await old.take("slow", 64, 0.2)  # makes room: it goes on, and cannot log that
            await eventually(lambda: session.failure is not None)
            if how == "evicted":
                await old.cancel("slow")
                for other in ("x", "y"):
                    await say(old, other, "x", max_tokens=1)
            elif how == "snapshot":
                with pytest.raises(Exception, match="cannot be written"):
                    await old._sessions.snapshot(session)
            else:
                await asyncio.sleep(0.2)
            await new.snapshot("s")
            third = made.add()
            rest = await say(third, "s", "", max_tokens=10)
            assert first + second + rest == greedy(tiny_lm, "ab", 103)

    run(test())


def test_a_session_whose_time_is_over_goes_without_being_named(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "MAINTENANCE_S", 0.02)

    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made:
            await made.replica.create("brief", None, (), 0.3, "r")
            for name in ("a", "b"):  # take its slab
                await say(made.replica, name, "x", max_tokens=1)
            assert "brief" not in slabs(made.replica)
            assert (tmp_path / "brief").exists()
            monkeypatch.setattr(maintenance, "EXPIRE_STORED_S", 0.1)
            await eventually(lambda: not (tmp_path / "brief").exists())
            assert (tmp_path / "a").exists()  # a day's time
            # One that another replica has had last may still be in use there.
            other = LanguageModel(made.settings, made)
            made.replicas.insert(0, other)
            await other.create("theirs", None, (), 0.3, "r")
            other._maintenance._task.cancel()
            await asyncio.sleep(0.5)
            assert (tmp_path / "theirs").exists()
            monkeypatch.setattr(stored_sessions, "ELSEWHERE_S", 0.1)
            await eventually(lambda: not (tmp_path / "theirs").exists())

    run(test())


def test_an_idle_session_in_memory_ends_after_its_time(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "MAINTENANCE_S", 0.02)

    async def test() -> None:
        async with cluster(tiny_lm, session_ttl_s=0.3) as made:
            await say(made.replica, "s", "x", max_tokens=1)
            await made.replica.start(ask("r", "busy", "x", max_tokens=None))
            await eventually(lambda: "s" not in slabs(made.replica))
            assert "busy" in slabs(made.replica)  # it generates
            assert isinstance(await made.replica.describe_session("s"), ApiError)

    run(test())


def test_two_forks_to_one_name(tiny_lm: Path, tmp_path: Path) -> None:
    async def test(store: str | None) -> None:
        async with cluster(tiny_lm, store=store, sessions=4) as made:
            for name in ("a", "b"):
                await say(made.replica, name, name, max_tokens=3)
            calls = (made.replica.fork(name, "twin", f"from-{name}") for name in ("a", "b"))
            one, other = await asyncio.wait_for(asyncio.gather(*calls), LIMIT_S)
            assert not isinstance(one, ApiError)
            assert isinstance(other, ApiError)
            assert (other.status, other.code) == (409, "session_exists")
            async with made.replica._sessions.locked("a"):
                crossed = [
                    asyncio.ensure_future(made.replica.fork(*names, "r"))
                    for names in (("a", "b"), ("b", "a"))
                ]
                await asyncio.sleep(0.05)  # each waits, for its own session or for the other's
            for refused in await asyncio.wait_for(asyncio.gather(*crossed), LIMIT_S):
                assert isinstance(refused, ApiError)

    run(test(None))
    run(test(str(tmp_path)))


def test_a_fork_in_memory_remembers_its_own_end(tiny_lm: Path) -> None:
    """How a chat's next turn begins depends on the last tokens of the stream."""

    async def test() -> None:
        async with cluster(tiny_lm, sessions=3) as made:
            first = await say(made.replica, "a", "ab", max_tokens=9)
            await made.replica.fork("a", "twin", "r")
            later = await say(made.replica, "a", "", max_tokens=9)
            tails = {
                session.session_id: list(session.tail)
                for session in made.replica._sessions.resident()
            }
            assert tails == {"a": later[-8:], "twin": first[-8:]}
            assert later[-8:] != first[-8:]

    run(test())


def test_a_pinned_prefix_is_durable_when_its_session_is_there(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmented_log, "GATHER_S", 0.2)

    async def test() -> None:
        uri = f"memory://{uuid.uuid4().hex}"
        async with cluster(tiny_lm, store=uri) as made:
            await made.replica.create("s", None, tuple(load_ids("pinned")), None, "r")
            assert SessionStore(uri, "any").position("s") == 6

    run(test())


def test_a_log_that_cannot_be_written_stops_what_it_does_not_have(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made:
            first = await say(made.replica, "s", "ab", max_tokens=5)

            def full(*_: object) -> None:
                raise OSError("no space left on device")

            monkeypatch.setattr(LocalLog, "append", full)
            refused = await made.replica.start(ask("r", "s", "cd", max_tokens=None))
            assert isinstance(refused, ApiError)
            assert (refused.status, refused.code) == (503, "log_failed")
            await eventually(lambda: not made.replica._engine._sessions["s"].busy)
            monkeypatch.undo()
            # As if the refused request had never been: what was not logged is not in the stream.
            rest = await say(made.replica, "s", "", max_tokens=5)
            assert first + rest == greedy(tiny_lm, "ab", 10)

    run(test())
