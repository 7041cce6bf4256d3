"""A session's write-ahead log: the token ids of its stream, in order, four bytes each.

Token n lies at byte 4 n, so the log's length is the stream's position and a torn write at its end
is cut off by dividing. Locally that is one file that is appended to; where nothing can be appended
to (S3), numbered segments, written behind by a thread.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

GATHER_S = 0.2
"""How long a remote log waits for more tokens before it puts a segment."""
MERGE_SEGMENTS = 64
"""Small segments of a remote log before they become one object."""

TOKEN_BYTES = 4
_TOKENS = "<i4"
_PUT_ATTEMPTS = 3


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
        data = _to_bytes(tokens)
        if os.fstat(self._file).st_size != self._position * TOKEN_BYTES:
            raise LostSession(f"{self._path} was written by another replica")
        if os.write(self._file, data) != len(data):
            raise OSError(f"{self._path}: a write was cut short (disk full?)")
        self._position += len(tokens)

    def read(self, start: int, stop: int | None = None) -> list[int]:
        """See `TokenLog`."""
        stop = self._position if stop is None else min(stop, self._position)
        data = os.pread(self._file, max(0, stop - start) * TOKEN_BYTES, start * TOKEN_BYTES)
        return _from_bytes(data).tolist()

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """Never calls: what is appended is durable."""

    def close(self) -> None:
        """See `TokenLog`."""
        os.close(self._file)


class SegmentedLog:
    """Objects `{first position}-{epoch}.i32`, written behind by a thread.

    An append costs a round trip here, so it does not wait for it: whoever shows tokens to a client
    holds back those at or beyond `durable`. What arrives within `GATHER_S`, or during a put, goes
    out together.

    Args:
        fs: fsspec file system.
        folder: where the segments lie.
        epoch: this owner's; an owner's first segment ends what earlier owners wrote.
    """

    def __init__(self, fs: Any, folder: str, epoch: int) -> None:
        self._fs, self._folder, self._epoch = fs, folder.rstrip("/"), epoch
        self._tokens = read_segments(fs, self._folder)
        self._durable = len(self._tokens)
        self._segments: list[str] = []  # our own small ones, not merged yet
        self._group_start = self._durable
        self._tell: Callable[[], None] | None = None
        self._failed: Exception | None = None
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_behind, name="token-log", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """See `TokenLog`."""
        return len(self._tokens)

    @property
    def durable(self) -> int:
        """See `TokenLog`."""
        return self._durable

    def append(self, tokens: Sequence[int]) -> None:
        """See `TokenLog`; raises OSError when an earlier segment could not be stored."""
        if self._failed is not None:
            raise OSError(f"{self._folder}: {self._failed}") from self._failed
        self._tokens.extend(tokens)
        self._wake.put(True)

    def read(self, start: int, stop: int | None = None) -> list[int]:
        """See `TokenLog`."""
        return self._tokens[start:stop].tolist()

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """See `TokenLog`."""
        self._tell = tell

    def close(self) -> None:
        """See `TokenLog`."""
        self._wake.put(False)
        self._thread.join()

    def _write_behind(self) -> None:
        running = True
        while running and self._failed is None:
            running = self._wake.get()
            if running:
                time.sleep(GATHER_S)
            while running and not self._wake.empty():
                running = self._wake.get()
            self._store_new()

    def _store_new(self) -> None:
        tokens = self._tokens[self._durable :]  # a copy: appends go on meanwhile
        if not tokens:
            return
        try:
            self._put(self._durable, tokens)
            self._durable += len(tokens)
            if len(self._segments) >= MERGE_SEGMENTS:
                self._merge()
        except Exception as error:  # kept: the next `append` raises it where tokens are made
            self._failed = error
        if self._tell is not None:
            self._tell()

    def _put(self, start: int, tokens: array[int]) -> None:
        name = self._name(start)
        for attempt in range(_PUT_ATTEMPTS):
            try:
                self._fs.pipe_file(name, _to_bytes(tokens))
                break
            except OSError:
                if attempt + 1 == _PUT_ATTEMPTS:
                    raise
        self._segments.append(name)

    def _merge(self) -> None:
        """Makes one object of the small ones, so that a long stream stays quick to open."""
        merged = self._tokens[self._group_start : self._durable]
        self._fs.pipe_file(self._name(self._group_start), _to_bytes(merged))
        self._fs.rm(self._segments[1:])  # the first has the merged one's name
        self._segments, self._group_start = [], self._durable

    def _name(self, start: int) -> str:
        return f"{self._folder}/{start:015d}-{self._epoch:06d}.i32"


def read_segments(fs: Any, folder: str) -> array[int]:
    """The whole log of a folder of segments.

    Raises:
        ValueError: a segment is missing.
    """
    parts = []
    for path in fs.glob(f"{folder}/*.i32"):
        first, _, written_by = Path(path).stem.partition("-")
        parts.append((int(written_by), int(first), path))
    tokens: array[int] = array("i")
    owner = -1
    for epoch, start, path in sorted(parts):
        if start > len(tokens):
            raise ValueError(f"{path}: {len(tokens)} tokens lie before it, not {start}")
        segment = _from_bytes(fs.cat_file(path))
        # Within one epoch a merge may have been interrupted: the pieces lie inside the whole.
        if epoch != owner or start + len(segment) > len(tokens):
            tokens = tokens[:start] + segment
        owner = epoch
    return tokens


def _to_bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, _TOKENS).tobytes()


def _from_bytes(data: bytes) -> array[int]:
    return array("i", np.frombuffer(data, _TOKENS).tolist())


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

    def close(self) -> None:
        """Nothing to close."""
