"""A session's write-ahead log: the token ids of its stream, in order, four bytes each.

Token n lies at byte 4 n, so that the log's length gives the stream's position, and an incomplete
write at its end is ignored. A local log is one file, written by appending. A store that cannot
append (S3) has the segments of `serve.lm.store.segmented_log`.
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
    """Another replica has written to this session, so that its state here is stale."""


class TokenLog(Protocol):
    """Interface of a session's log.

    `position` counts the tokens appended, `durable` those that survive the end of this process.
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
        """Appends tokens; raises `LostSession` if another replica has appended some."""
        ...

    def read(self, start: int, stop: int | None = None) -> list[int]:
        """Returns tokens `start` to `stop` of the stream, by default to its end."""
        ...

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """Has `tell` called, from any thread, whenever `durable` has grown after an `append`."""
        ...

    def wait(self, position: int) -> None:
        """Blocks until `position` tokens are durable; raises OSError if they cannot be stored."""
        ...

    def close(self) -> None:
        """Writes the tokens that still wait and closes the files."""
        ...


class LocalLog:
    """A log in one local file. It survives `kill -9`, but not a power cut.

    Args:
        path: the file; created if it does not exist, else cut to whole tokens.
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
        """Never calls `tell`: appended tokens are durable at once."""

    def wait(self, position: int) -> None:
        """Does not wait: appended tokens are durable at once."""

    def close(self) -> None:
        """See `TokenLog`."""
        os.close(self._file)


def to_bytes(tokens: Sequence[int]) -> bytes:
    """Returns the stored form of tokens."""
    return np.asarray(tokens, _TOKENS).tobytes()


def from_bytes(data: bytes) -> list[int]:
    """Returns tokens from their stored form."""
    ids: list[int] = np.frombuffer(data, _TOKENS).tolist()
    return ids


class MemoryLog:
    """Counts tokens without keeping them, for sessions that end with their replica."""

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
        """Raises LookupError for any range but an empty one, for nothing is kept."""
        if start < (self._position if stop is None else stop):
            raise LookupError("this server keeps no log of its sessions")
        return []

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """Never calls `tell`."""

    def wait(self, position: int) -> None:
        """Does not wait."""

    def close(self) -> None:
        """Nothing to close."""
