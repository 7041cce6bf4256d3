"""A session's write-ahead log: the token ids of its stream, in order, four bytes each.

Token n lies at byte 4 n, so the log's length is the stream's position and a torn write at its end
is cut off by dividing. Locally that is one file that is appended to; where nothing can be appended
to (S3), the segments of `serve.lm.store.segmented_log`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

TOKEN_BYTES = 4
_TOKENS = "<i4"


class LostSession(RuntimeError):
    """Another replica has written to this session: what is held here is stale."""


class TokenLog(Protocol):
    """What a session needs of its log.

    `position` counts the tokens appended, `durable` those that survive the death of this process.
    """

    @property
    def position(self) -> int:
        """Tokens appended so far."""
        ...

    @property
    def durable(self) -> int:
        """Tokens that are stored; never more than `position`."""
        ...

    def append(self, tokens: Sequence[int]) -> None:
        """Adds tokens at the end; raises `LostSession` when somebody else has."""
        ...

    def read(self, start: int, stop: int | None = None) -> list[int]:
        """Tokens `start` to `stop` of the stream (to its end by default)."""
        ...

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """Calls `tell`, from any thread, whenever `durable` has grown later than `append`."""
        ...

    def wait(self, position: int) -> None:
        """Blocks until `position` tokens are durable; raises OSError when they cannot be."""
        ...

    def close(self) -> None:
        """Writes what is still waiting and lets go of the files."""
        ...


class LocalLog:
    """One file, appended to and flushed at every call: it survives `kill -9`, not a power cut.

    Args:
        path: the file; made if it is not there, cut to whole tokens if it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._position = os.fstat(self._file).st_size // TOKEN_BYTES
        os.ftruncate(self._file, self._position * TOKEN_BYTES)

    @property
    def position(self) -> int:
        """See `TokenLog`."""
        return self._position

    durable = position

    def append(self, tokens: Sequence[int]) -> None:
        """See `TokenLog`."""
        data = to_bytes(tokens)
        if os.fstat(self._file).st_size != self._position * TOKEN_BYTES:
            raise LostSession(f"{self._path} was written by another replica")
        if os.write(self._file, data) != len(data):
            os.ftruncate(self._file, self._position * TOKEN_BYTES)  # all of a prompt or nothing
            raise OSError(f"{self._path}: a write was cut short (disk full?)")
        self._position += len(tokens)

    def read(self, start: int, stop: int | None = None) -> list[int]:
        """See `TokenLog`."""
        stop = self._position if stop is None else min(stop, self._position)
        data = os.pread(self._file, max(0, stop - start) * TOKEN_BYTES, start * TOKEN_BYTES)
        return from_bytes(data)

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """Never calls: what is appended is durable."""

    def wait(self, position: int) -> None:
        """Does not wait: what is appended is durable."""

    def close(self) -> None:
        """See `TokenLog`."""
        os.close(self._file)


def to_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as they are stored."""
    return np.asarray(tokens, _TOKENS).tobytes()


def from_bytes(data: bytes) -> list[int]:
    """Stored tokens."""
    ids: list[int] = np.frombuffer(data, _TOKENS).tolist()
    return ids


class MemoryLog:
    """Counts tokens and keeps none: for sessions that end with their replica."""

    def __init__(self, position: int = 0) -> None:
        self._position = position

    @property
    def position(self) -> int:
        """See `TokenLog`."""
        return self._position

    durable = position

    def append(self, tokens: Sequence[int]) -> None:
        """See `TokenLog`."""
        self._position += len(tokens)

    def read(self, start: int, stop: int | None = None) -> list[int]:
        """Nothing is kept; raises LookupError for anything but an empty range."""
        if start < (self._position if stop is None else stop):
            raise LookupError("this server keeps no log of its sessions")
        return []

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """Never calls."""

    def wait(self, position: int) -> None:
        """Does not wait."""

    def close(self) -> None:
        """Nothing to close."""
