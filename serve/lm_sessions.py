"""The sessions whose keys and values lie in this replica, and how they come and go.

A slab is taken for a session when it is asked for: from the engine's free ones, else from the least
recently used idle session, which is snapshotted first. Where sessions are not stored, none is taken
from anybody.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from models.sink_lm.cache import NoFreeSlab
from models.sink_lm.engine import Engine
from serve.lm_contract import TAIL, SessionState
from serve.lm_engine_thread import EngineThread
from serve.lm_refusals import NO_RETRY, Refusal, no_slab, session_exists, unknown_session
from serve.session_store import OtherModel, SessionStore, StoredSession, Turn
from serve.token_log import LostSession, MemoryLog, TokenLog

Result = TypeVar("Result")


@dataclass(eq=False, kw_only=True)
class Held:
    """A session with a slab.

    Attributes:
        session_id: its name.
        sinks: see `SessionSpec`.
        ttl_s: see `SessionSpec`.
        log: of its tokens.
        stored: its files; None where sessions are not stored.
        turn: the latest prompt.
        tail: last tokens of the stream.
        answer: name of the answer in progress.
        snapshot_at: position of the newest snapshot.
        last_used: `time.monotonic` of the last request.
        failure: why nothing more can be logged: what is generated from then on is not shown.
    """

    session_id: str
    sinks: int
    ttl_s: float | None
    log: TokenLog
    stored: StoredSession | None = None
    turn: Turn = field(default_factory=Turn)
    tail: deque[int] = field(default_factory=lambda: deque(maxlen=TAIL))
    answer: str | None = None
    snapshot_at: int = 0
    last_used: float = field(default_factory=time.monotonic)
    failure: Exception | None = None


class SessionTable:
    """Gives out sessions, with slabs.

    Args:
        engine: holds the slabs.
        thread: runs it.
        store: where sessions are kept; None keeps them nowhere.
        sinks: of a session that does not choose.
        ttl_s: of a session that does not choose.
        capacity: tokens a session sees.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        store: SessionStore | None,
        *,
        sinks: int,
        ttl_s: float | None,
        capacity: int,
    ) -> None:
        self._engine, self._thread, self.store = engine, thread, store
        self._sinks, self._ttl_s, self._capacity = sinks, ttl_s, capacity
        self._replica = uuid.uuid4().hex
        self._held: dict[str, Held] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def journal(self, session_id: str, tokens: Sequence[int]) -> None:
        """The engine's write-ahead log; runs in its thread, before the tokens are seen.

        A failure ends this session, not the engine: it is kept for whoever reads the answer.
        """
        held = self._held.get(session_id)
        if held is None or held.failure is not None:
            return
        try:
            held.log.append(tokens)
        except (LostSession, OSError) as error:
            held.failure = error
            return
        held.tail.extend(tokens)

    def lock(self, session_id: str) -> asyncio.Lock:
        """One request at a time may change a session."""
        return self._locks.setdefault(session_id, asyncio.Lock())

    def held(self) -> list[Held]:
        """All sessions with a slab here."""
        return list(self._held.values())

    def get(self, session_id: str) -> Held | None:
        """A session with a slab here."""
        return self._held.get(session_id)

    async def take(self, session_id: str, *, create: bool) -> Held:
        """A session with its slab, loaded or made if need be.

        Raises:
            Refusal: 404, 409 for another model's, 429 when there is no slab.
        """
        held = self._held.get(session_id)
        if held is not None and not await self._is_current(held):
            await self.drop(held)  # what is here is stale
            held = None
        if held is None:
            await self._expire_stored(session_id)
            if self.store is not None and await io(partial(self._is_stored, session_id)):
                held = await self._load(session_id)
            elif create:
                held = await self.create(session_id)
            else:
                raise unknown_session(session_id)
        held.last_used = time.monotonic()
        return held

    async def create(
        self,
        session_id: str,
        *,
        sinks: int | None = None,
        ttl_s: float | None = None,
        pinned: Sequence[int] = (),
    ) -> Held:
        """Makes a session.

        Args:
            session_id: its name.
            sinks: None takes the default.
            ttl_s: None takes the default.
            pinned: tokens that begin the stream.
        """
        sinks = self._sinks if sinks is None else sinks
        ttl_s = self._ttl_s if ttl_s is None else ttl_s
        await self._expire_stored(session_id)
        if session_id in self._held or await io(partial(self._is_stored, session_id)):
            raise session_exists(session_id)
        held = await self._make(session_id, sinks, ttl_s, pinned)
        try:
            await self._place(held, {}, pinned)
        except BaseException:
            await self._forget(held)
            raise
        return held

    async def drop(self, held: Held) -> None:
        """Frees a session's slab; what is stored of it stays."""
        self._held.pop(held.session_id, None)
        await self._thread.call(lambda: self._engine.close(held.session_id))
        if held.stored is not None:
            await io(held.stored.close)

    async def delete(self, session_id: str) -> None:
        """Removes a session, stored or not."""
        held = self._held.get(session_id)
        if held is not None:
            await self.drop(held)
        if self.store is not None:
            await io(partial(self.store.delete, session_id))
        self._locks.pop(session_id, None)

    async def snapshot(self, held: Held) -> None:
        """Stores a session's keys and values; a tick waits for the copy, not for the writing."""
        stored = held.stored
        if stored is None:
            raise Refusal(409, "no_store", "this server stores no sessions", headers=NO_RETRY)
        state = await self._thread.call(lambda: self._engine.export(held.session_id))
        position = state_position(state)
        if position > held.snapshot_at:
            await io(partial(stored.save_snapshot, position, state))
            held.snapshot_at = position

    async def fork(self, held: Held, new_id: str) -> SessionState:
        """Makes a second session with the same stream so far.

        A stored one gets no slab yet: its next request may go to another replica.
        """
        if new_id in self._held or await io(partial(self._is_stored, new_id)):
            raise session_exists(new_id)
        if self.store is None:
            await self._with_room(lambda: self._engine.fork(held.session_id, new_id))
            twin = replace(held, session_id=new_id, log=MemoryLog(held.log.position), answer=None)
            twin.tail = held.tail.copy()
            self._held[new_id] = twin
            return await self.state(twin)
        state = await self._thread.call(lambda: self._engine.export(held.session_id))
        await io(partial(self._store_fork, held, new_id, state))
        return await io(partial(self._stored_state, new_id))

    def _store_fork(self, held: Held, new_id: str, state: dict[str, Tensor]) -> None:
        assert self.store is not None
        twin = self.store.create(new_id, self._replica, sinks=held.sinks, ttl_s=held.ttl_s)
        twin.log.append(held.log.read(0))
        twin.begin_turn(replace(held.turn, request_id=""))
        twin.save_snapshot(state_position(state), state)
        twin.close()

    async def state(self, held: Held, *, extra: int = 0) -> SessionState:
        """A session seen from outside, `extra` tokens further on."""
        position = held.log.position + extra
        cached = min(position, self._capacity - 1)
        return SessionState(
            id=held.session_id,
            stream_position=position,
            cached_tokens=cached,
            evicted_tokens=position - cached,
            sinks=held.sinks,
            answer_from=held.turn.answer_from,
            status="idle" if held.answer is None else "generating",
            ttl_s=held.ttl_s,
            snapshot_position=held.snapshot_at or None,
            owner_epoch=held.stored.epoch if held.stored is not None else None,
        )

    async def describe(self, session_id: str) -> SessionState:
        """A session seen from outside, without loading it; raises `Refusal` 404."""
        held = self._held.get(session_id)
        if held is not None and await self._is_current(held):
            return await self.state(held)
        await self._expire_stored(session_id)
        if not await io(partial(self._is_stored, session_id)):
            raise unknown_session(session_id)
        return await io(partial(self._stored_state, session_id))

    async def names(self) -> list[str]:
        """Sessions held here and all that are stored."""
        stored = await io(self.store.names) if self.store is not None else []
        return sorted({*self._held, *stored})

    async def open_temporary(self, session_id: str) -> None:
        """Takes a slab for a stream that nobody comes back to."""
        await self._with_room(lambda: self._engine.open(session_id, sinks=self._sinks))

    async def restore_temporary(self, session_id: str, state: dict[str, Tensor]) -> None:
        """Takes a slab for one of several answers to the same prompt."""
        await self._with_room(lambda: self._engine.restore(session_id, state))

    async def close_temporary(self, session_id: str) -> None:
        """Frees a temporary stream's slab."""
        await self._thread.call(lambda: self._engine.close(session_id))

    async def _make(
        self, session_id: str, sinks: int, ttl_s: float | None, pinned: Sequence[int]
    ) -> Held:
        turn = Turn(answer_from=len(pinned))
        if self.store is None:
            log: TokenLog = MemoryLog()
            log.append(pinned)
            return Held(session_id=session_id, sinks=sinks, ttl_s=ttl_s, log=log, turn=turn)
        make = partial(self.store.create, session_id, self._replica, sinks=sinks, ttl_s=ttl_s)
        stored = await io(make)
        stored.log.append(pinned)
        await io(partial(stored.begin_turn, turn))
        return Held(
            session_id=session_id,
            sinks=sinks,
            ttl_s=ttl_s,
            log=stored.log,
            stored=stored,
            turn=turn,
        )

    async def _load(self, session_id: str) -> Held:
        """Takes a stored session over: newest snapshot, then the log's tail through prefill."""
        assert self.store is not None
        try:
            stored = await io(partial(self.store.open, session_id, self._replica))
        except OtherModel as error:
            raise Refusal(409, "other_model", str(error), headers=NO_RETRY) from error
        position, state = await io(stored.newest_snapshot)
        held = Held(
            session_id=session_id,
            sinks=stored.spec.sinks,
            ttl_s=stored.spec.ttl_s,
            log=stored.log,
            stored=stored,
            turn=await io(partial(self.store.turn, session_id)),
            snapshot_at=position,
        )
        try:
            await self._place(held, state, await io(partial(stored.log.read, position)))
        except BaseException:
            await io(stored.close)
            raise
        return held

    async def _place(self, held: Held, state: dict[str, Tensor], rest: Sequence[int]) -> None:
        """Gives a session a slab with `state` in it, then feeds it the tokens after that."""
        session_id = held.session_id

        def place() -> None:
            self._engine.restore(session_id, state or self._empty(held.sinks), rest)

        await self._with_room(place)
        held.tail.extend(held.log.read(max(0, held.log.position - TAIL)) if held.stored else rest)
        self._held[session_id] = held

    def _empty(self, sinks: int) -> dict[str, Tensor]:
        """The state of a stream without tokens."""
        name = f"empty-{uuid.uuid4().hex}"
        self._engine.open(name, sinks=sinks)
        try:
            return self._engine.export(name)
        finally:
            self._engine.close(name)

    async def _is_current(self, held: Held) -> bool:
        """Whether a held session is still this replica's, with all its tokens logged."""
        if held.failure is not None:
            return False
        return held.stored is None or await io(held.stored.is_owned)

    async def _forget(self, held: Held) -> None:
        """Takes back a session whose making failed."""
        self._held.pop(held.session_id, None)
        if held.stored is not None and self.store is not None:
            await io(held.stored.close)
            await io(partial(self.store.delete, held.session_id))

    async def _with_room(self, work: Callable[[], Result]) -> Result:
        """Runs `work`, which takes a slab, making room for it if there is none."""
        while True:
            try:
                return await self._thread.call(work)
            except NoFreeSlab as error:
                idle = [h for h in self._held.values() if h.answer is None and h.stored is not None]
                idle = [h for h in idle if not self.lock(h.session_id).locked()]
                if not idle:
                    raise no_slab() from error
                oldest = min(idle, key=lambda held: held.last_used)
                async with self.lock(oldest.session_id):
                    await self.snapshot(oldest)
                    await self.drop(oldest)

    async def expire(self) -> None:
        """Deletes the idle sessions held here whose time is over."""
        now = time.monotonic()
        for held in self.held():
            over = held.ttl_s is not None and now - held.last_used > held.ttl_s
            lock = self.lock(held.session_id)
            if over and held.answer is None and not lock.locked():
                async with lock:
                    await self.delete(held.session_id)

    async def _expire_stored(self, session_id: str) -> None:
        """Deletes a stored session whose time is over."""
        store = self.store
        if store is None or session_id in self._held:
            return

        def expire() -> None:
            if store.exists(session_id):
                ttl_s = store.spec(session_id).ttl_s
                if ttl_s is not None and time.time() - store.last_used(session_id) > ttl_s:
                    store.delete(session_id)

        await io(expire)

    def _is_stored(self, session_id: str) -> bool:
        return self.store is not None and self.store.exists(session_id)

    def _stored_state(self, session_id: str) -> SessionState:
        assert self.store is not None
        spec, position = self.store.spec(session_id), self.store.position(session_id)
        cached = min(position, self._capacity - 1)
        return SessionState(
            id=session_id,
            stream_position=position,
            cached_tokens=cached,
            evicted_tokens=position - cached,
            sinks=spec.sinks,
            answer_from=self.store.turn(session_id).answer_from,
            status="stored",
            ttl_s=spec.ttl_s,
            snapshot_position=next(iter(self.store.snapshots(session_id)), None),
        )


async def io(work: Callable[[], Result]) -> Result:
    """Runs something that waits for a disk or a network in a thread."""
    return await asyncio.to_thread(work)


def state_position(state: dict[str, Tensor]) -> int:
    """Tokens of the stream that an exported state has seen."""
    return int(state["length"]) + len(state["pending"])
