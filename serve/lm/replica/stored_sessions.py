"""Session files as seen by one replica: create, load, fork, delete.

Every method waits for a disk or a network. On a server that stores no sessions there are none, and
the methods answer so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from serve.lm.contract import SessionState
from serve.lm.replica.resident_session import ResidentSession, state_position, stored_state
from serve.lm.store.session_store import SessionStore, StoredSession, Turn

COPY_TOKENS = 65_536
"""Tokens of a log that a fork copies at a time."""
ELSEWHERE_S = 300.0
"""Seconds beyond its `ttl_s` that a session stays if another replica opened it last.

That replica may be generating in it and write nothing because a slow reader has paused it."""


class StoredSessions:
    """The stored sessions, as one replica sees them.

    Args:
        store: where they lie; None stores no sessions.
        replica: name of this replica.
        capacity: tokens that a session sees.
    """

    def __init__(self, store: SessionStore | None, replica: str, capacity: int) -> None:
        self.store, self._replica, self._capacity = store, replica, capacity

    def names(self) -> list[str]:
        """Returns the names of all stored sessions."""
        return [] if self.store is None else self.store.names()

    def has(self, session_id: str) -> bool:
        """Whether a session is stored."""
        return self.store is not None and self.store.exists(session_id)

    def has_from(self, session_id: str, request_id: str) -> bool:
        """Whether a session is stored that this request has created."""
        store = self.store
        if store is None or not request_id or not store.exists(session_id):
            return False
        return store.spec(session_id).request_id == request_id

    def is_over(self, session_id: str) -> bool:
        """Whether a session has been idle for too long."""
        store = self.store
        if store is None or not store.exists(session_id):
            return False
        ttl_s = store.spec(session_id).ttl_s
        if ttl_s is None:
            return False
        if store.owner(session_id).get("replica") != self._replica:
            ttl_s += ELSEWHERE_S
        return time.time() - store.last_used(session_id) > ttl_s

    def describe(self, session_id: str) -> SessionState:
        """Describes a session."""
        assert self.store is not None
        return stored_state(self.store, session_id, self._capacity)

    def delete(self, session_id: str) -> None:
        """Deletes a session's files, if it has any."""
        if self.store is not None:
            self.store.delete(session_id)

    def make(
        self,
        session_id: str,
        *,
        sinks: int,
        ttl_s: float | None,
        pinned: Sequence[int],
        request_id: str,
    ) -> StoredSession | None:
        """Creates a session that begins with `pinned`; it is durable when this returns.

        Raises:
            SessionExists: the name is taken.
            LostSession: another replica is creating one of that name.
        """
        if self.store is None:
            return None
        stored = self.store.create(
            session_id, self._replica, sinks=sinks, ttl_s=ttl_s, request_id=request_id
        )
        try:
            stored.log.append(pinned)
            stored.begin_turn(Turn(answer_from=len(pinned)))
            stored.publish()
        except BaseException:
            stored.close()
            raise
        return stored

    def fork(
        self, session: ResidentSession, new_id: str, state: dict[str, Tensor], request_id: str
    ) -> None:
        """Creates a session with the same stream, up to the position of `state`.

        Raises:
            SessionExists: the name is taken.
            LostSession: another replica is creating one of that name.
        """
        assert self.store is not None
        twin = self.store.create(
            new_id, self._replica, sinks=session.sinks, ttl_s=session.ttl_s, request_id=request_id
        )
        try:
            position = state_position(state)
            for start in range(0, position, COPY_TOKENS):
                twin.log.append(session.log.read(start, min(start + COPY_TOKENS, position)))
            twin.begin_turn(replace(session.turn, request_id=""))
            twin.save_snapshot(position, state)
            twin.publish()
        finally:
            twin.close()

    def load(self, session_id: str) -> tuple[ResidentSession, dict[str, Tensor], list[int]]:
        """Opens a session, which takes it over from any other replica.

        Returns:
            The session, the state of its newest snapshot, and the tokens after that.

        Raises:
            UnknownSession: there is none.
            OtherModel: it belongs to another model.
        """
        assert self.store is not None
        stored = self.store.open(session_id, self._replica)
        try:
            position, state = stored.newest_snapshot()
            session = ResidentSession(
                session_id=session_id,
                sinks=stored.spec.sinks,
                ttl_s=stored.spec.ttl_s,
                log=stored.log,
                stored=stored,
                turn=self.store.turn(session_id),
                snapshot_at=position,
            )
            return session, state, stored.log.read(position)
        except BaseException:
            stored.close()
            raise
