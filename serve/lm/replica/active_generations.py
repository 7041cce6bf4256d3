"""The answers in progress in a replica, each by the id of the request it belongs to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from serve.lm.replica.generations import ActiveGeneration
from serve.lm.replica.resident_session import ResidentSession
from serve.lm.replica.session_table import SessionTable
from serve.lm.replica.tasks import Locks


class ActiveGenerations:
    """Where answers are handed in, asked for, and taken away again.

    Args:
        sessions: those they are generated in.
    """

    def __init__(self, sessions: SessionTable) -> None:
        self._sessions = sessions
        self._answers: dict[str, ActiveGeneration] = {}
        self._expected: dict[str, asyncio.Event] = {}
        self.locks = Locks()
        """Whoever starts a request's answer holds its lock: to cancel it is to wait for it."""

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[tuple[str, ActiveGeneration]]:
        return iter(list(self._answers.items()))

    def get(self, request_id: str) -> ActiveGeneration | None:
        """An answer in progress."""
        return self._answers.get(request_id)

    @contextlib.contextmanager
    def expect(self, request_id: str) -> Iterator[asyncio.Event]:
        """While an answer is being started: an event that is set when nobody waits for it."""
        gone = self._expected[request_id] = asyncio.Event()
        try:
            yield gone
        finally:
            del self._expected[request_id]

    def leave(self, request_id: str) -> None:
        """Nobody waits for an answer any more that may still have to begin."""
        if request_id in self._expected:
            self._expected[request_id].set()

    def put(
        self, request_id: str, running: ActiveGeneration, session: ResidentSession | None = None
    ) -> None:
        """Takes an answer in, for a kept session or for a temporary one."""
        self._answers[request_id] = running
        if session is not None:
            session.active_request = request_id
            session.log.when_durable(running.tell)

    async def end(self, request_id: str) -> None:
        """Ends an answer at a token boundary; its session stays."""
        running = self._answers.get(request_id)
        if running is not None:
            if running.session_id is not None:
                await running.stop()
            await self.forget(request_id)

    async def forget(self, request_id: str) -> None:
        """Lets go of an answer that has ended; temporary streams end with it."""
        running = self._answers.pop(request_id, None)
        if running is None:
            return
        session = self._sessions.get(running.session_id) if running.session_id is not None else None
        if session is not None and session.active_request == request_id:
            session.active_request, session.last_used = None, time.monotonic()
            session.log.when_durable(None)
        if running.session_id is None:
            await self._sessions.close_temporary([each.session_id for each in running.choices])
