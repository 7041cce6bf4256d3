"""The resident sessions of a replica: those whose keys and values are in its memory.

A session gets a slab when a request needs it: a free one, else that of the least recently used idle
session, which is snapshotted first. If sessions are not stored, no slab is taken from another one.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from models.sink_lm.engine.engine import Engine
from models.sink_lm.engine.session import SessionExists, UnknownSession
from models.sink_lm.network.cache import NoFreeSlab
from serve.ingress.errors import ApiError
from serve.lm.contract import TAIL, SessionState
from serve.lm.replica.engine_thread import EngineThread
from serve.lm.replica.refusals import (
    NO_RETRY,
    log_failed,
    session_exists,
    unknown_session,
)
from serve.lm.replica.resident_session import ResidentSession, state_position
from serve.lm.replica.stored_sessions import StoredSessions
from serve.lm.replica.tasks import Locks, io
from serve.lm.store.session_store import (
    OtherModel,
    SessionStore,
    Turn,
)
from serve.lm.store.token_log import LostSession, MemoryLog

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class SessionTable:
    """Creates, loads, snapshots and evicts resident sessions.

    Args:
        engine: has the slabs.
        thread: runs the engine.
        store: where sessions are stored; None stores none.
        sinks: sink tokens of a session that does not set them.
        ttl_s: idle seconds of a session that does not set them.
        capacity: tokens that a session sees.
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
        self._engine, self._thread = engine, thread
        self._sinks, self._ttl_s, self._capacity = sinks, ttl_s, capacity
        self._stored = StoredSessions(store, uuid.uuid4().hex, capacity)
        self._resident: dict[str, ResidentSession] = {}
        self._locks = Locks()

    def journal(self, session_id: str, tokens: Sequence[int]) -> None:
        """Logs tokens before anyone sees them; the engine calls it, in its thread.

        A failure ends this session, not the engine: it is stored for the reader of the answer.
        """
        session = self._resident.get(session_id)
        if session is None or session.failure is not None:
            return
        try:
            session.log.append(tokens)
        except (LostSession, OSError) as error:
            session.failure = error
            return
        session.tail.extend(tokens)

    @contextlib.asynccontextmanager
    async def locked(self, *session_ids: str) -> AsyncGenerator[None, None]:
        """Lets one request at a time change a session; several are always locked in one order."""
        async with contextlib.AsyncExitStack() as stack:
            for session_id in sorted(set(session_ids)):
                await stack.enter_async_context(self._locks.get(session_id))
            yield

    def is_locked(self, session_id: str) -> bool:
        """Whether a request is changing a session."""
        return self._locks.get(session_id).locked()

    def resident(self) -> list[ResidentSession]:
        """Returns all sessions with a slab here."""
        return list(self._resident.values())

    def get(self, session_id: str) -> ResidentSession | None:
        """Returns a session if it has a slab here."""
        return self._resident.get(session_id)

    async def take(self, session_id: str, *, create: bool) -> ResidentSession:
        """Returns a session with a slab, loaded or created if need be.

        Call it with the session locked.

        Raises:
            ApiError: 404 if there is no such session, 409 if it belongs to another model.
            NoFreeSlab: no slab is free or can be freed.
        """
        session = self._resident.get(session_id)
        if session is not None and not await self.is_current(session):
            await self.drop(session)  # what is here is stale
            session = None
        if session is None:
            await self.expire_stored(session_id)
            if await io(partial(self._stored.has, session_id)):
                session = await self._load(session_id)
            elif create:
                session = await self.create(session_id)
            else:
                raise unknown_session(session_id)
        session.last_used = time.monotonic()
        return session

    async def create(
        self,
        session_id: str,
        *,
        sinks: int | None = None,
        ttl_s: float | None = None,
        pinned: Sequence[int] = (),
        request_id: str = "",
    ) -> ResidentSession:
        """Creates a session; call it with the session locked.

        Args:
            session_id: its name.
            sinks: sink tokens; None takes the default.
            ttl_s: idle seconds until it is deleted; None takes the default.
            pinned: tokens that begin the stream; durable when this returns.
            request_id: the same for a repeated call, which then returns the first call's session.

        Raises:
            ApiError: 409 if the name is taken.
            NoFreeSlab: no slab is free or can be freed.
        """
        sinks = self._sinks if sinks is None else sinks
        ttl_s = self._ttl_s if ttl_s is None else ttl_s
        await self.expire_stored(session_id)
        if await io(partial(self._stored.has_from, session_id, request_id)):
            return await self.take(session_id, create=False)
        if session_id in self._resident or await io(partial(self._stored.has, session_id)):
            raise session_exists(session_id)
        make = partial(self._stored.make, session_id, sinks=sinks, ttl_s=ttl_s)
        try:
            stored = await io(partial(make, pinned=pinned, request_id=request_id))
        except (SessionExists, LostSession) as error:
            raise session_exists(session_id) from error
        session = ResidentSession(
            session_id=session_id,
            sinks=sinks,
            ttl_s=ttl_s,
            log=MemoryLog(len(pinned)) if stored is None else stored.log,
            stored=stored,
            turn=Turn(answer_from=len(pinned)),
        )
        try:
            await self._place(session, {}, pinned)
        except BaseException:
            await self._close(session)
            await io(partial(self._stored.delete, session_id))
            raise
        return session

    async def drop(self, session: ResidentSession) -> None:
        """Frees a session's slab; its files stay."""
        self._resident.pop(session.session_id, None)
        await self._thread.call(lambda: self._engine.close(session.session_id))
        await self._close(session)

    async def delete(self, session_id: str) -> None:
        """Deletes a session, stored or not; call it with the session locked."""
        session = self._resident.get(session_id)
        if session is not None:
            await self.drop(session)
        await io(partial(self._stored.delete, session_id))

    async def snapshot(self, session: ResidentSession) -> None:
        """Stores a session's keys and values; a tick waits for the copy, not for the writing.

        Raises:
            ApiError: 409 if this server stores no sessions; 503 if the session's log has failed or
                another replica has the session, so that its log may differ from this slab.
        """
        stored = session.stored
        if stored is None:
            raise ApiError(409, "no_store", "this server stores no sessions", headers=NO_RETRY)
        if not await self.is_current(session):
            raise log_failed(session.failure)
        state = await self._thread.call(lambda: self._engine.export(session.session_id))
        position = state_position(state)
        if session.failure is not None:  # failed meanwhile: the state has tokens that the log lacks
            raise log_failed(session.failure)
        if position > session.snapshot_at:
            await io(partial(stored.save_snapshot, position, state))
            session.snapshot_at = position

    async def is_current(self, session: ResidentSession) -> bool:
        """Whether a resident session is still this replica's and all its tokens are logged."""
        owned = session.stored is None or await io(session.stored.is_owned)
        if session.failure is None and not owned:
            session.failure = LostSession(f"{session.session_id}: another replica has opened it")
        return session.failure is None

    async def fork(self, session: ResidentSession, new_id: str, request_id: str) -> SessionState:
        """Creates a second session with the same stream; call it with both locked.

        A stored session gets no slab yet, for its next request may go to another replica.
        """
        if self._stored.store is None:
            if new_id in self._resident:
                raise session_exists(new_id)
            await self._with_room(lambda: self._engine.fork(session.session_id, new_id))
            twin = replace(
                session, session_id=new_id, log=MemoryLog(session.log.position), active_request=None
            )
            twin.tail, twin.last_used = session.tail.copy(), time.monotonic()
            self._resident[new_id] = twin
            return twin.state(self._capacity)
        if not await io(partial(self._stored.has_from, new_id, request_id)):
            state = await self._thread.call(lambda: self._engine.export(session.session_id))
            try:
                await io(partial(self._stored.fork, session, new_id, state, request_id))
            except (SessionExists, LostSession) as error:
                raise session_exists(new_id) from error
        return await io(partial(self._stored.describe, new_id))

    async def describe(self, session_id: str) -> SessionState:
        """Describes a session without loading it; raises the `ApiError` 404 if there is none."""
        session = self._resident.get(session_id)
        if session is not None and await self.is_current(session):
            return session.state(self._capacity)
        if not await io(partial(self._stored.has, session_id)):
            raise unknown_session(session_id)
        if await io(partial(self._stored.is_over, session_id)):
            raise unknown_session(session_id)
        return await io(partial(self._stored.describe, session_id))

    async def names(self) -> list[str]:
        """Returns the names of the resident sessions and of all stored ones."""
        return sorted({*self._resident, *await io(self._stored.names)})

    async def open_temporary(self, session_id: str) -> None:
        """Opens a temporary session, which ends with its answer."""
        await self._with_room(lambda: self._engine.open(session_id, sinks=self._sinks))

    async def refill_temporary(self, session_ids: Sequence[str], state: dict[str, Tensor]) -> None:
        """Gives several temporary sessions the same state, in the slabs that they have."""

        def refill() -> None:
            for session_id in session_ids:
                self._engine.close(session_id)
                self._engine.restore(session_id, state)

        await self._thread.call(refill)

    async def close_temporary(self, session_ids: Sequence[str]) -> None:
        """Frees the slabs of temporary sessions, all after the tick in progress."""

        def close() -> None:
            for session_id in session_ids:
                self._engine.close(session_id)

        await self._thread.call(close)

    def room(self) -> int:
        """Returns how many slabs are free or have an idle session that can be stored."""
        return self._engine.slabs.free + len(self._evictable())

    def _evictable(self) -> list[ResidentSession]:
        idle = [
            h for h in self._resident.values() if h.active_request is None and h.stored is not None
        ]
        return [session for session in idle if not self.is_locked(session.session_id)]

    async def expire_resident(self, session: ResidentSession) -> None:
        """Deletes a resident session that has been idle for longer than its `ttl_s`."""

        def is_over() -> bool:
            over = (
                session.ttl_s is not None and time.monotonic() - session.last_used > session.ttl_s
            )
            return (
                over
                and session.active_request is None
                and self._resident.get(session.session_id) is session
            )

        if is_over() and not self.is_locked(session.session_id):
            async with self.locked(session.session_id):
                if is_over():  # look again: another request may have come first
                    await self.delete(session.session_id)

    async def expire_stored(self, session_id: str) -> None:
        """Does the same for a session without a slab here; call it with the session locked."""
        if session_id not in self._resident and await io(partial(self._stored.is_over, session_id)):
            await io(partial(self._stored.delete, session_id))

    async def _load(self, session_id: str) -> ResidentSession:
        """Opens a stored session: its newest snapshot, then a prefill of the log's tail."""
        try:
            session, state, rest = await io(partial(self._stored.load, session_id))
        except OtherModel as error:
            raise ApiError(409, "other_model", str(error), headers=NO_RETRY) from error
        except UnknownSession as error:  # deleted meanwhile
            raise unknown_session(session_id) from error
        try:
            await self._place(session, state, rest)
        except BaseException:
            await self._close(session)
            raise
        return session

    async def _place(
        self, session: ResidentSession, state: dict[str, Tensor], rest: Sequence[int]
    ) -> None:
        """Gives a session a slab with `state` in it and feeds it the tokens after that."""
        session_id, tail = session.session_id, list(rest[-TAIL:])
        if session.stored is not None:
            tail = await io(partial(session.log.read, max(0, session.log.position - TAIL)))

        def place() -> None:
            self._engine.restore(session_id, state or self._empty(session.sinks), rest)

        await self._with_room(place)
        session.tail.extend(tail)
        self._resident[session_id] = session

    def _empty(self, sinks: int) -> dict[str, Tensor]:
        """Returns the state of a stream without tokens."""
        name = f"empty-{uuid.uuid4().hex}"
        self._engine.open(name, sinks=sinks)
        try:
            return self._engine.export(name)
        finally:
            self._engine.close(name)

    async def _close(self, session: ResidentSession) -> None:
        """Closes a session's files."""
        if session.stored is not None:
            await io(session.stored.close)

    async def _with_room(self, work: Callable[[], Result]) -> Result:
        """Runs `work`, which takes a slab, making room for it if there is none."""
        while True:
            try:
                return await self._thread.call(work)
            except NoFreeSlab:
                idle = self._evictable()
                if not idle:
                    raise
                oldest = min(idle, key=lambda session: session.last_used)
                async with self.locked(oldest.session_id):
                    # Look again: another request may have come first.
                    if (
                        self._resident.get(oldest.session_id) is oldest
                        and oldest.active_request is None
                    ):
                        await self._evict(oldest)

    async def _evict(self, session: ResidentSession) -> None:
        """Takes an idle session's slab; if there can be no snapshot, its log is enough."""
        try:
            await self.snapshot(session)
        except ApiError as refusal:  # it is not ours any more, and its log is valid
            log.info("session %s: no snapshot: %s", session.session_id, refusal)
        except OSError:
            log.exception("session %s: no snapshot", session.session_id)
        await self.drop(session)
