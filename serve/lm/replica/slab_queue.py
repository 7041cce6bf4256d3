"""Requests that wait for a slab, first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from models.sink_lm.network.cache import NoFreeSlab
from serve.lm.replica.refusals import no_slab, nobody_waits

LOOK_S = 0.02
"""Seconds between two looks for free slabs of the first in the queue."""
Result = TypeVar("Result")


class SlabQueue:
    """A queue with a bound and a time limit in front of the slabs.

    Args:
        limit: requests that may wait; more are refused at once.
        wait_s: seconds that a request may wait before it is refused.
        room: returns how many slabs are free or can be freed.
        waited: called with the seconds that each request waited.
    """

    def __init__(
        self,
        limit: int,
        wait_s: float,
        *,
        room: Callable[[], int],
        waited: Callable[[float], object],
    ) -> None:
        self._limit, self._wait_s = limit, wait_s
        self._room, self._waited = room, waited
        self._waiting: deque[object] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    async def run(
        self, attempt: Callable[[], Awaitable[Result]], slabs: int, gone: asyncio.Event
    ) -> Result:
        """Runs `attempt` as soon as it is its turn and there are enough slabs.

        Args:
            attempt: takes all its slabs or none; raises `NoFreeSlab` if there are too few.
            slabs: how many it takes.
            gone: set when nobody waits for the result any more.

        Raises:
            ApiError: 429 if too many wait or it took too long, 409 when `gone` is set.
        """
        if not self._waiting and self._room() >= slabs:
            with contextlib.suppress(NoFreeSlab):  # another request was quicker
                return await attempt()
        if len(self._waiting) >= self._limit:
            raise no_slab(waiting=len(self._waiting))
        place, since = object(), time.monotonic()
        self._waiting.append(place)
        try:
            while True:
                await self._turn(place, slabs, gone, since + self._wait_s)
                try:
                    return await attempt()
                except NoFreeSlab:  # taken meanwhile by a resident session
                    continue
        finally:
            self._waiting.remove(place)
            self._waited(time.monotonic() - since)

    async def _turn(self, place: object, slabs: int, gone: asyncio.Event, until: float) -> None:
        """Waits until it is the first in the queue and there is room."""
        while True:
            if gone.is_set():
                raise nobody_waits()
            if time.monotonic() > until:
                raise no_slab(waited_s=self._wait_s)
            await asyncio.sleep(LOOK_S)
            if self._waiting[0] is place and self._room() >= slabs:
                return
