"""Periodic work of a replica: snapshots, unread generations, expired sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable

from serve.ingress.errors import ApiError
from serve.lm.replica.active_generations import ActiveGenerations
from serve.lm.replica.resident_session import ResidentSession
from serve.lm.replica.session_table import SessionTable
from serve.lm.settings import LMSettings

MAINTENANCE_S = 1.0
"""Seconds between two rounds."""
EXPIRE_STORED_S = 300.0
"""Seconds between two looks at all stored sessions."""

log = logging.getLogger(__name__)


class Maintenance:
    """Runs from its construction on, in the event loop of its caller.

    Args:
        settings: time limits and the interval between snapshots.
        sessions: the sessions of this replica.
        active: the generations of this replica.
    """

    def __init__(
        self, settings: LMSettings, sessions: SessionTable, active: ActiveGenerations
    ) -> None:
        self._settings, self._sessions, self._active = settings, sessions, active
        self._expired_at = time.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def check(self) -> None:
        """Raises RuntimeError if it has stopped."""
        if self._task.done():
            raise RuntimeError("maintenance stopped: nothing is reaped or snapshotted")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(MAINTENANCE_S)
            await self._try(self.round())

    async def round(self) -> None:
        """Looks at everything once. A failure is logged, and the round goes on."""
        now = time.monotonic()
        for request_id, running in self._active:
            unread = now - running.last_read > self._settings.reader_timeout_s
            if unread and not running.readers:
                await self._try(self._active.end(request_id))
        for session in self._sessions.resident():
            await self._try(self._maintain(session))
        if now - self._expired_at > EXPIRE_STORED_S:
            self._expired_at = now
            await self._try(self._expire_stored())

    async def _maintain(self, session: ResidentSession) -> None:
        sessions = self._sessions
        if session.failure is not None:
            await self._give_up(session)
        elif not sessions.is_locked(session.session_id):
            grown = session.log.position - session.snapshot_at >= self._settings.snapshot_every
            if grown and session.stored is not None:
                async with sessions.locked(session.session_id):
                    if sessions.get(session.session_id) is session:
                        await sessions.snapshot(session)
            await sessions.expire_resident(session)

    async def _give_up(self, session: ResidentSession) -> None:
        """Ends the answer of a session whose log has failed; frees its slab in a later round."""
        running = (
            self._active.get(session.active_request) if session.active_request is not None else None
        )
        if running is not None:
            for choice in running.choices:
                choice.cancel()
        elif not self._sessions.is_locked(session.session_id):
            async with self._sessions.locked(session.session_id):
                if self._sessions.get(session.session_id) is session:
                    await self._sessions.drop(session)

    async def _expire_stored(self) -> None:
        for session_id in await self._sessions.names():
            if not self._sessions.is_locked(session_id):
                async with self._sessions.locked(session_id):
                    await self._try(self._sessions.expire_stored(session_id))

    async def _try(self, work: Awaitable[None]) -> None:
        try:
            await work
        except ApiError as refusal:  # for example, another replica has opened the session
            log.info("left for the next round: %s", refusal)
        except Exception:  # from a disk or a network
            log.exception("left for the next round")
