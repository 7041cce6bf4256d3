"""Ingests a live stream: segments are cut, encoded and published while it runs.

    python -m pipelines.ingest --source rtsp://camera/1 --out shards/live --follow

One process does everything: a thread reads packets (live_connection.py), and the main thread
decodes, encodes (live_rows.py) and publishes (dataset/live_set.py). A broken connection is opened
again. A kill loses only what is not yet published. Memory holds one segment, the packets that wait,
and the rows of the next shard.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
import time
from collections import Counter
from fractions import Fraction
from typing import Any

import av
from rich.console import Console

from models.media.video.containers import VideoError
from models.media.video.video_reader import FrameReader
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.aspects import ingest_note, read_aspects
from pipelines.dataset.live_set import LiveSet, Timeline
from pipelines.dataset.shards import Manifest
from pipelines.ingestion.live_connection import (
    PLAYLISTS,
    TICK_S,
    Connection,
    SourceError,
    describe_error,
    file_identity,
    kind_of,
)
from pipelines.ingestion.live_rows import ContinuedConnection, RowCutter
from pipelines.runtime.places import prepare
from pipelines.runtime.progress import SECONDS_BETWEEN_LINES
from pipelines.runtime.uris import public_name

FOREVER_S = 1e12
REPLAY_S = 120  # a playlist that goes back further is a new stream at the same address


def follow(cfg: IngestConfig, stop: threading.Event | None = None) -> Manifest:
    """Publishes a live stream to `cfg.out` until it ends or `stop` is set.

    Raises:
        ValueError: The source cannot be opened or has no video, or `cfg.out` holds something else.
        OSError: The storage failed; run again to continue.
    """
    cfg = prepare(cfg)
    with LiveSet(cfg) as live_set:
        return Follower(cfg, live_set, stop or threading.Event()).run()


class Follower:
    """Records one stream over any number of connections.

    Args:
        cfg: The ingest configuration.
        live_set: The data set to which segments are published.
        stop: Ends the recording when set.
    """

    def __init__(self, cfg: IngestConfig, live_set: LiveSet, stop: threading.Event) -> None:
        self._cfg, self._set, self._stop = cfg, live_set, stop
        self._console = Console()
        self._timeline = live_set.progress.timeline
        self._rows: list[dict[str, Any]] = []
        self._losses: Counter[str] = Counter()
        self._connections = self._segments = self._bytes = 0
        self._lag = 0.0
        # Time of the start, the first opening or the last frame, whichever is latest.
        self._alive = self._published = self._shown = time.monotonic()
        self._frames = 0
        self._last_error = ""

    def run(self) -> Manifest:
        """Records until the stream ends or `stop` is set; returns and raises as `follow` does."""
        failures = 0
        while not self._over():
            before = self._frames
            if self._attempt():
                break
            failures = 0 if self._frames > before else failures + 1
            self._wait(failures)
        self._publish()
        if self._set.manifest is None:
            raise ValueError(f"--source: no video came from {public_name(self._cfg.source)}")
        self._show(last=True)
        aspects = read_aspects(self._cfg.out, self._set.manifest)
        if aspects and (note := ingest_note(aspects)):
            self._console.print(note, markup=False, highlight=False, soft_wrap=True)
        return self._set.manifest

    def _attempt(self) -> bool:
        """Records one connection until it ends; returns True if no other can be opened."""
        kind = ""
        try:
            kind = kind_of(self._cfg.source, self._cfg.live.format)
            with contextlib.closing(Connection(self._cfg, self._tick)) as connection:
                stream = connection.open()
                if stream is not None:
                    self._take(connection, stream)
                self._last_error = describe_error(connection.error) if connection.error else ""
                return kind == "pipe"
        except (SourceError, VideoError) as error:
            self._last_error = describe_error(error)
            if kind == "pipe":  # a pipe cannot be read twice
                raise ValueError(f"--source: {self._last_error}") from error
            return False

    def _over(self) -> bool:
        """Whether to stop recording.

        Raises:
            ValueError: The source could not be opened in time.
        """
        if self._stop.is_set():
            return True
        if self._late() and not self._connections:
            waited = f"not open after {self._cfg.live.open_seconds:g} s"
            raise ValueError(f"--source: {waited}: {self._last_error or 'nothing came'}")
        return self._late()

    def _late(self) -> bool:
        """Whether no video has come for longer than the configuration allows."""
        live = self._cfg.live
        seconds = live.end_seconds if self._connections else live.open_seconds
        return time.monotonic() - self._alive > seconds

    def _tick(self) -> bool:
        """Publishes and reports when it is time to; returns True if the connection should end."""
        if self._rows and time.monotonic() - self._published >= self._cfg.live.publish_seconds:
            self._publish()
        self._show()
        return self._stop.is_set() or self._late()

    def _wait(self, failures: int) -> None:
        """Prints why, then waits before the next connection, twice as long after every failure."""
        if self._over():
            return
        live = self._cfg.live
        seconds = min(live.backoff_seconds * 2.0 ** min(failures, 30), live.most_backoff_seconds)
        why = self._last_error or "the stream ended"
        self._console.print(
            f"connecting again in {seconds:g} s: {why}", markup=False, soft_wrap=True
        )
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._tick():
            self._stop.wait(min(left, TICK_S))

    def _take(self, connection: Connection, stream: av.VideoStream) -> None:
        """Cuts all frames of a connection into segments."""
        if not self._connections:
            self._alive = time.monotonic()
        self._connections += 1
        uri = (
            f"{public_name(self._cfg.source)}#run={self._set.run:x}&connection={self._connections}"
        )
        timeline = self._continued(connection, stream)
        reader = FrameReader(
            ContinuedConnection(connection, timeline, self._cfg.video.max_gap),
            stream,
            max_seconds=FOREVER_S,
            max_pixels=self._cfg.video.max_pixels,
            max_gap=self._cfg.video.max_gap,
            start=timeline.origin if timeline.begun else None,
        )
        cutter = RowCutter(self._cfg, uri, timeline, connection)
        try:
            for frame in reader:
                self._alive, self._lag = time.monotonic(), connection.lag
                self._frames += 1
                for row in cutter.push(frame, reader.start or Fraction(0)):
                    self._keep(row, cutter.timeline)
            for row in cutter.finish():
                self._keep(row, cutter.timeline)
        except VideoError as error:
            self._losses[error.reason] += 1
            raise
        finally:
            self._losses.update({reason for reason, _ in reader.losses} - {"truncated"})
            self._losses.update(["connection_lost"] if connection.error else [])

    def _continued(self, connection: Connection, stream: av.VideoStream) -> Timeline:
        """Returns the last timeline if this source repeats what was recorded; else a new one."""
        last = self._timeline
        identity = ""
        if connection.kind == "file":
            identity = file_identity(self._cfg.source, last.identity if last else "")
        elif connection.format.name in PLAYLISTS:
            identity = public_name(self._cfg.source)
        if last is None or not identity or last.identity != identity:
            return Timeline(identity=identity)
        begin = Fraction(stream.start_time or 0) * (stream.time_base or 1)
        if connection.kind == "url" and last.end - begin > REPLAY_S:
            return Timeline(identity=identity)
        return last

    def _keep(self, row: dict[str, Any], timeline: Timeline) -> None:
        if not self._rows and not self._segments:
            self._published = time.monotonic()
        self._rows.append(row)
        self._timeline = timeline
        self._segments += 1
        self._bytes += len(row["video"])
        if sum(len(row["video"]) for row in self._rows) >= self._cfg.shard_bytes:
            self._publish()

    def _publish(self) -> None:
        """Publishes the complete rows, if there are any."""
        self._published = time.monotonic()
        if self._rows:
            assert self._timeline is not None
            self._set.publish(self._rows, self._timeline, self._losses)
            self._rows, self._losses = [], Counter()

    def _show(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        manifest = self._set.manifest
        published = self._set.progress.seconds
        parts = (
            f"published {dt.timedelta(seconds=int(published))}",
            f"in {len(manifest.shards) if manifest else 0} shards",
            f"lag {self._lag:.1f} s",
            f"{self._segments:,} segments",
            f"{self._bytes / 1e6:,.1f} MB",
            f"{max(self._connections - 1, 0)} reconnects",
        )
        quiet = now - self._alive
        silent = f"  no video for {quiet:.0f} s" if quiet > 2 * TICK_S + 1 and not last else ""
        self._console.print(
            "  ".join(parts) + silent, markup=False, highlight=False, soft_wrap=True
        )
