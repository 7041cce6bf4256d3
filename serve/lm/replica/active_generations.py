"""The generations in progress in a replica, by the ids of their requests."""

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
    """Registry of the generations in progress.

    Args:
        sessions: the sessions they are generated in.
    """

    def __init__(self, sessions: SessionTable) -> None:
        self._sessions = sessions
        self._answers: dict[str, ActiveGeneration] = {}
        self._expected: dict[str, asyncio.Event] = {}
        self._over: dict[str, asyncio.Event] = {}
        self.locks = Locks()
        """A request's lock is held while its generation is started, so a cancel waits for that."""

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[tuple[str, ActiveGeneration]]:
        return iter(list(self._answers.items()))

    def get(self, request_id: str) -> ActiveGeneration | None:
        """Returns a generation in progress."""
        return self._answers.get(request_id)

    @contextlib.contextmanager
    def expect(self, request_id: str) -> Iterator[asyncio.Event]:
        """Yields an event that is set when nobody waits any more for the generation to start."""
        gone = self._expected[request_id] = asyncio.Event()
        try:
            yield gone
        finally:
            del self._expected[request_id]

    def leave(self, request_id: str) -> None:
        """Says that nobody waits any more for a generation that may still have to start."""
        if request_id in self._expected:
            self._expected[request_id].set()

    def put(
        self, request_id: str, running: ActiveGeneration, session: ResidentSession | None = None
    ) -> None:
        """Registers a generation, of a resident session or of temporary ones."""
        self._answers[request_id] = running
        self._over.setdefault(request_id, asyncio.Event())
        if session is not None:
            session.active_request = request_id
            session.log.when_durable(running.tell)

    async def end(self, request_id: str) -> None:
        """Ends a generation at a token boundary; its session stays."""
        running = self._answers.get(request_id)
        if running is not None:
            if running.session_id is not None:
                await running.stop()
            await self.forget(request_id)

    async def over(self, request_id: str) -> None:
        """Waits until a generation has been forgotten."""
        if request_id in self._over:
            await self._over[request_id].wait()

    async def forget(self, request_id: str) -> None:
        """Removes a generation that has ended; temporary sessions end with it."""
        running = self._answers.pop(request_id, None)
        if running is None:
            return
        self._over.pop(request_id).set()
        session = self._sessions.get(running.session_id) if running.session_id is not None else None
        if session is not None and session.active_request == request_id:
            session.active_request, session.last_used = None, time.monotonic()
            session.log.when_durable(None)
        if running.session_id is None:
            await self._sessions.close_temporary([each.session_id for each in running.choices])
