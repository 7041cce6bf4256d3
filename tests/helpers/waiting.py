"""Waiting for what another thread, task or process does, however busy the machine is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LIMIT_S = 90.0
"""Far more than anything takes: who waits here fails only when a thing does not happen at all."""


def wait_until(holds: Callable[[], object], *, every_s: float = 0.02) -> None:
    """Returns as soon as `holds()` is true; raises TimeoutError after `LIMIT_S`."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        _check(deadline)
        time.sleep(every_s)


async def eventually(holds: Callable[[], object], *, every_s: float = 0.01) -> None:
    """As `wait_until`, for code that shares its thread with what it waits for."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        _check(deadline)
        await asyncio.sleep(every_s)


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"it did not happen within {LIMIT_S:.0f} s")
