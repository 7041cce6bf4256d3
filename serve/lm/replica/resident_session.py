"""A session with a slab in this replica, and the descriptions of sessions."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from serve.lm.contract import TAIL, SessionState
from serve.lm.store.session_store import SessionStore, StoredSession, Turn
from serve.lm.store.token_log import TokenLog


@dataclass(eq=False, kw_only=True)
class ResidentSession:
    """A session with a slab.

    Attributes:
        session_id: its name.
        sinks: see `SessionSpec`.
        ttl_s: see `SessionSpec`.
        log: write-ahead log of its tokens.
        stored: its files; None if sessions are not stored.
        turn: where the latest prompt and its answer lie.
        tail: last tokens of the stream.
        active_request: id of the request that it generates for, if any.
        snapshot_at: position of the newest snapshot.
        last_used: `time.monotonic` of the last request.
        failure: why its log can no longer be written. Later tokens are not shown.
    """

    session_id: str
    sinks: int
    ttl_s: float | None
    log: TokenLog
    stored: StoredSession | None = None
    turn: Turn = field(default_factory=Turn)
    tail: deque[int] = field(default_factory=lambda: deque(maxlen=TAIL))
    active_request: str | None = None
    snapshot_at: int = 0
    last_used: float = field(default_factory=time.monotonic)
    failure: Exception | None = None

    def state(self, capacity: int, *, extra: int = 0) -> SessionState:
        """Describes the session as it will be after `extra` more tokens."""
        position = self.log.position + extra
        cached = min(position, capacity - 1)
        return SessionState(
            id=self.session_id,
            stream_position=position,
            cached_tokens=cached,
            evicted_tokens=position - cached,
            sinks=self.sinks,
            answer_from=self.turn.answer_from,
            status="idle" if self.active_request is None else "generating",
            ttl_s=self.ttl_s,
            snapshot_position=self.snapshot_at or None,
            owner_epoch=self.stored.epoch if self.stored is not None else None,
        )


def stored_state(store: SessionStore, session_id: str, capacity: int) -> SessionState:
    """Describes a session without a slab here, from its files."""
    spec, position = store.spec(session_id), store.position(session_id)
    cached = min(position, capacity - 1)
    return SessionState(
        id=session_id,
        stream_position=position,
        cached_tokens=cached,
        evicted_tokens=position - cached,
        sinks=spec.sinks,
        answer_from=store.turn(session_id).answer_from,
        status="stored",
        ttl_s=spec.ttl_s,
        snapshot_position=next(iter(store.snapshots(session_id)), None),
    )


def state_position(state: dict[str, Tensor]) -> int:
    """Returns how many tokens of the stream an exported state includes."""
    return int(state["length"]) + len(state["pending"])
