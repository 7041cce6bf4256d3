"""A token log for stores that cannot append (S3): numbered segments, written by a thread.

    FOLDER/{first position}-{owner's epoch}.i32

An owner's first segment ends the earlier owners' log: their tokens count only up to its start. Many
small segments are merged into one, each token at most twice, so that a stream of a million tokens
has a few hundred objects. Memory holds the tokens that are not stored yet and one record per
object.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.lm.store.token_log import TOKEN_BYTES, from_bytes, to_bytes

GATHER_S = 0.2
"""Seconds that a log waits for more tokens before it writes a segment."""
MERGE_SEGMENTS = 64
"""This many segments at the log's end are merged if each has fewer tokens than this, and again if
each has fewer than this squared. Larger ones stay, so that a merge moves at most a megabyte."""
WAIT_S = 60.0
"""Seconds that `wait` gives a store to write a segment."""

_PUT_ATTEMPTS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """The first tokens of an object: tokens `start` to `stop` of the stream."""

    start: int
    stop: int
    path: str

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class SegmentedLog:
    """See `serve.lm.store.token_log.TokenLog`.

    A write costs a round trip to the store, so `append` does not wait for it. Tokens from `durable`
    on must not be shown to a client yet. Tokens that arrive within `GATHER_S`, or during a write,
    go into one segment.

    Args:
        fs: fsspec file system.
        folder: where the segments lie.
        epoch: number of this owner.
    """

    def __init__(self, fs: Any, folder: str, epoch: int) -> None:
        self._fs, self._folder, self._epoch = fs, folder.rstrip("/"), epoch
        self._segments = list_segments(fs, self._folder)
        self._durable = self._segments[-1].stop if self._segments else 0
        self._waiting: list[int] = []  # from `durable` on
        self._tell: Callable[[], None] | None = None
        self._failed: Exception | None = None
        self._stored = threading.Condition()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_behind, name="token-log", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """See `TokenLog`."""
        with self._stored:
            return self._durable + len(self._waiting)

    @property
    def durable(self) -> int:
        """See `TokenLog`."""
        return self._durable

    def append(self, tokens: Sequence[int]) -> None:
        """See `TokenLog`; raises OSError if an earlier segment could not be stored."""
        with self._stored:
            self._raise_failure()
            self._waiting.extend(tokens)
        self._wake.put(True)

    def read(self, start: int, stop: int | None = None) -> list[int]:
        """See `TokenLog`; stored tokens are fetched one segment at a time."""
        with self._stored:
            durable, segments, waiting = self._durable, list(self._segments), list(self._waiting)
        stop = durable + len(waiting) if stop is None else min(stop, durable + len(waiting))
        stored = _read(self._fs, segments, start, min(stop, durable))
        if stored is None:  # merged meanwhile, by us or by an owner unaware of us
            segments = list_segments(self._fs, self._folder)
            stored = _read(self._fs, segments, start, min(stop, durable))
        if stored is None:
            raise OSError(f"{self._folder}: a segment is missing")
        return stored + waiting[max(0, start - durable) : max(0, stop - durable)]

    def when_durable(self, tell: Callable[[], None] | None) -> None:
        """See `TokenLog`."""
        self._tell = tell

    def wait(self, position: int) -> None:
        """See `TokenLog`."""
        with self._stored:
            self._stored.wait_for(
                lambda: self._durable >= position or self._failed is not None, WAIT_S
            )
            if self._durable < position:
                self._raise_failure()
                raise OSError(f"{self._folder}: nothing was stored for {WAIT_S:.0f} s")

    def close(self) -> None:
        """See `TokenLog`."""
        self._wake.put(False)
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise OSError(f"{self._folder}: {self._failed}") from self._failed

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
        tokens = list(self._waiting)  # a copy: appends go on meanwhile
        if not tokens:
            return
        try:
            segment = self._put(self._durable, tokens)
            with self._stored:
                self._segments.append(segment)
                self._durable = segment.stop
                del self._waiting[: len(tokens)]
        except Exception as error:  # kept: the next `append` raises it
            self._failed = error
        with self._stored:
            self._stored.notify_all()
        if self._tell is not None:
            self._tell()
        if self._failed is None:
            self._tidy()

    def _put(self, start: int, tokens: Sequence[int]) -> Segment:
        path = f"{self._folder}/{start:015d}-{self._epoch:06d}.i32"
        for attempt in range(_PUT_ATTEMPTS):
            try:
                self._fs.pipe_file(path, to_bytes(tokens))
                break
            except OSError:
                if attempt + 1 == _PUT_ATTEMPTS:
                    raise
        return Segment(start, start + len(tokens), path)

    def _tidy(self) -> None:
        try:
            self._merge()
        except Exception:  # no token is lost, and the next segment tries again
            log.exception("%s: segments are not merged", self._folder)

    def _merge(self) -> None:
        """Merges many small objects at the end into one, so that a log stays quick to open."""
        for limit in (MERGE_SEGMENTS, MERGE_SEGMENTS**2):
            large = [i for i, segment in enumerate(self._segments) if segment.size >= limit]
            first = large[-1] + 1 if large else 0
            small = self._segments[first:]
            if len(small) < MERGE_SEGMENTS:
                continue
            tokens = _read(self._fs, small, small[0].start, small[-1].stop)
            if tokens is None:  # an earlier owner, unaware of us, has merged them itself
                with self._stored:
                    self._segments = list_segments(self._fs, self._folder)
                return
            merged = self._put(small[0].start, tokens)
            with self._stored:
                self._segments[first:] = [merged]
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm([segment.path for segment in small if segment.path != merged.path])


def list_segments(fs: Any, folder: str) -> list[Segment]:
    """Returns the segments of a log in order, from one listing and without reading any.

    Raises:
        OSError: tokens are missing between two of them.
    """
    try:
        found = fs.find(folder, detail=True)
    except FileNotFoundError:
        return []
    by_epoch: dict[int, list[Segment]] = {}
    for path, entry in found.items():
        if path.endswith(".i32"):
            start, _, epoch = Path(path).stem.partition("-")
            stop = int(start) + int(entry["size"]) // TOKEN_BYTES
            by_epoch.setdefault(int(epoch), []).append(Segment(int(start), stop, path))
    return _in_order(by_epoch)


def _in_order(by_epoch: dict[int, list[Segment]]) -> list[Segment]:
    """Returns the parts of all owners' segments that count, in the order of the stream."""
    found: list[Segment] = []
    for epoch in sorted(by_epoch, reverse=True):
        border = found[0].start if found else None
        found = _without_pieces(by_epoch[epoch], border) + found
    for earlier, later in zip([Segment(0, 0, ""), *found], found, strict=False):
        if earlier.stop != later.start:
            raise OSError(f"{later.path}: {earlier.stop} tokens lie before it, not {later.start}")
    return found


def _without_pieces(mine: Iterable[Segment], border: int | None) -> list[Segment]:
    """Returns one owner's segments before `border`, without those that a merged one includes."""
    kept: list[Segment] = []
    for segment in sorted(mine, key=lambda segment: segment.start):
        end = segment.stop if border is None else min(segment.stop, border)
        if segment.start < end and (not kept or end > kept[-1].stop):
            kept.append(replace(segment, stop=end))
    return kept


def _read(fs: Any, segments: Sequence[Segment], start: int, stop: int) -> list[int] | None:
    """Returns tokens `start` to `stop`; None if a segment no longer exists."""
    tokens: list[int] = []
    for segment in segments:
        first, last = max(start, segment.start), min(stop, segment.stop)
        if first < last:
            span = [(at - segment.start) * TOKEN_BYTES for at in (first, last)]
            try:
                data = fs.cat_file(segment.path, start=span[0], end=span[1])
            except FileNotFoundError:
                return None
            tokens += from_bytes(data)
    return tokens
