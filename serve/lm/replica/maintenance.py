"""What a replica does by itself: snapshots, and an end to what nobody reads or comes back to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable

from serve.lm.replica.active_generations import Desk
from serve.lm.replica.refusals import Refusal
from serve.lm.replica.resident_session import Held
from serve.lm.replica.session_table import SessionTable
from serve.lm.settings import LMSettings

KEEP_HOUSE_S = 1.0
EXPIRE_STORED_S = 300.0
"""Between two walks through all stored sessions."""

log = logging.getLogger(__name__)


class Housekeeper:
    """Runs from its making on, in the loop of whoever made it.

    Args:
        settings: when to do what.
        sessions: those of this replica.
        desk: their answers.
    """

    def __init__(self, settings: LMSettings, sessions: SessionTable, desk: Desk) -> None:
        self._settings, self._sessions, self._desk = settings, sessions, desk
        self._walked = time.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def check(self) -> None:
        """Raises RuntimeError when it has stopped."""
        if self._task.done():
            raise RuntimeError("the housekeeper stopped: nothing is reaped or snapshotted")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(KEEP_HOUSE_S)
            await self._try(self.round())

    async def round(self) -> None:
        """Looks at everything once; what fails is logged, and no reason to leave out the rest."""
        now = time.monotonic()
        for request_id, running in self._desk:
            unread = now - running.last_read > self._settings.reader_timeout_s
            if unread and not running.readers:
                await self._try(self._desk.end(request_id))
        for held in self._sessions.held():
            await self._try(self._look_after(held))
        if now - self._walked > EXPIRE_STORED_S:
            self._walked = now
            await self._try(self._expire_stored())

    async def _look_after(self, held: Held) -> None:
        sessions = self._sessions
        if held.failure is not None:
            await self._give_up(held)
        elif not sessions.is_locked(held.session_id):
            grown = held.log.position - held.snapshot_at >= self._settings.snapshot_every
            if grown and held.stored is not None:
                async with sessions.locked(held.session_id):
                    if sessions.get(held.session_id) is held:
                        await sessions.snapshot(held)
            await sessions.expire_held(held)

    async def _give_up(self, held: Held) -> None:
        """A session that cannot be logged here: its reader is told, then its slab is free."""
        running = self._desk.get(held.answer) if held.answer is not None else None
        if running is not None:
            for source in running.sources:
                source.cancel()
        elif not self._sessions.is_locked(held.session_id):
            async with self._sessions.locked(held.session_id):
                if self._sessions.get(held.session_id) is held:
                    await self._sessions.drop(held)

    async def _expire_stored(self) -> None:
        for session_id in await self._sessions.names():
            if not self._sessions.is_locked(session_id):
                async with self._sessions.locked(session_id):
                    await self._try(self._sessions.expire_stored(session_id))

    async def _try(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Refusal as refusal:  # a session is another replica's now
            log.info("left for the next round: %s", refusal)
        except Exception:  # a disk or a network
            log.exception("left for the next round")
