"""Locks by name: as many as are in use."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Locks:
    """One lock a name, for as long as anybody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._locks)

    def get(self, name: str) -> asyncio.Lock:
        """The lock of a name; everybody who asks while it lives gets the same one."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
