"""Frames of one live connection to rows of a shard, continuing where the last connection ended."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av

from models.media.video.video_reader import Restarts, TimedFrame, frame_period
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.live_set import Timeline
from pipelines.dataset.shards import hash_bytes
from pipelines.ingestion.live_connection import Connection, from_position
from pipelines.ingestion.preparing.segments import Segment, Segmenter, rate_of
from pipelines.ingestion.preparing.videos import segment_id, segment_row


class ContinuedConnection:
    """A connection without the packets that are already in segments, for a `FrameReader`."""

    def __init__(self, connection: Connection, timeline: Timeline, max_gap: float) -> None:
        self.format, self.duration = connection.format, connection.duration
        self._connection, self._timeline, self._max_gap = connection, timeline, max_gap

    def demux(self, stream: av.VideoStream) -> Iterator[Any]:
        """Yields packets."""
        line, packets = self._timeline, self._connection.demux(stream)
        if not line.begun:
            return from_position(packets, None)
        jumps = (
            line.jumps if self._connection.kind == "file" else 0
        )  # a playlist has forgotten them
        restarts = Restarts(frame_period(stream), self._max_gap)
        return from_position(packets, line.end, jumps, restarts)


class RowCutter:
    """Cuts the frames of one connection into rows, each with the time at which it arrived."""

    def __init__(
        self, cfg: IngestConfig, uri: str, timeline: Timeline, connection: Connection
    ) -> None:
        self._cfg, self._uri, self._connection = cfg, uri, connection
        self.timeline = timeline
        self._segmenter = Segmenter(cfg.video, cfg.short_side)
        self._key = hash_bytes(uri.encode())
        self._origin, self._jumps = timeline.origin, timeline.jumps
        self._last = Fraction(0)
        # Time of the first frame that is in no segment yet.
        self._from = timeline.end - timeline.origin if timeline.begun else None
        self._arrived: dict[int, float] = {}  # for frames with which a segment may still begin
        self._number = 0

    def push(self, frame: TimedFrame, origin: Fraction) -> Iterator[dict[str, Any]]:
        """Takes the next frame; yields the rows that it completes."""
        half = min(frame.duration, 1 / rate_of(self._cfg.video)) / 2
        if self._from is not None and frame.time < self._from - half:
            return
        self._from, self._origin = None, origin
        self._arrived[frame.index] = self._connection.arrived
        for segment in self._segmenter.push(frame):
            yield self._row(segment)
        self._jumps += frame.time < self._last
        self._last = frame.time

    def finish(self) -> Iterator[dict[str, Any]]:
        """Yields the last row, if any."""
        for segment in self._segmenter.finish():
            yield self._row(segment)

    def _row(self, segment: Segment) -> dict[str, Any]:
        arrived = self._arrived[segment.source_frames[0]]
        last = segment.source_frames[-1]
        self._arrived = {n: time for n, time in self._arrived.items() if n >= last}
        row = segment_row(segment, segment_id(self._key, self._number, self._cfg), self._cfg, {})
        self._number += 1
        seconds = Fraction(segment.num_frames) / rate_of(self._cfg.video)
        end = self._origin + Fraction(segment.start_s) + seconds
        self.timeline = Timeline(
            identity=self.timeline.identity, origin=self._origin, end=end, jumps=self._jumps
        )
        recorded = dt.datetime.fromtimestamp(arrived, dt.UTC)
        return row | {"source_uri": self._uri, "recorded_at": recorded}
