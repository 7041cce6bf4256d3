"""A live container (MPEG-TS, Matroska or WebM, fragmented MP4) to transformed frames as they come.

Runs in a decoder process (`serve/decode_worker.py`). Bytes are asked for when the demuxer wants
them, so the replica knows at every moment whether it waits for the source or for us.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import av

from models.preprocessing import Preprocessing
from models.video_decode import (
    RgbConverter,
    VideoError,
    describe,
    limit_decoder,
    pixel_aspect,
)
from serve.clip_sampling import CODECS, upright_pixels

# No playlists, and nothing that needs the end of a file first.
CONTAINERS = "mpegts,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"
PROBE_BYTES = 1_000_000  # to find the streams; five million by default, seconds of a live source
READ_TRIES = 8  # damaged reads in a row before the source counts as broken


class Channel(Protocol):
    """What `serve.decode_worker.Channel` is."""

    def send(self, head: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        """Sends one message."""

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Receives one message."""


class AskedFile:
    """A file, read from front to back, whose bytes come from the replica.

    Args:
        channel: to the replica.
        clock: called with False before each wait for the source, which is not our time, and with
            True after it.
    """

    def __init__(self, channel: Channel, clock: Callable[[bool], None]) -> None:
        self._channel, self._clock = channel, clock
        self._held = memoryview(b"")
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """Returns at least one byte, or none at the end."""
        if not self._held and not self._ended:
            self._channel.send({"need": True})
            self._clock(False)
            _, data = self._channel.receive()
            self._clock(True)
            self._held, self._ended = memoryview(data), not data
        piece = self._held[: size if size >= 0 else len(self._held)]
        self._held = self._held[len(piece) :]
        return bytes(piece)


def decode_stream(
    channel: Channel,
    prep: Preprocessing,
    *,
    clock: Callable[[bool], None],
    max_pixels: int,
) -> None:
    """Sends {"time_s": seconds since the first frame} with uint8 [S, S, 3] for every frame.

    Args:
        channel: to the replica.
        prep: the transform.
        clock: see `AskedFile`.
        max_pixels: refuse larger frames.

    Raises:
        VideoError: with the reason.
    """
    options = {"format_whitelist": CONTAINERS, "probesize": str(PROBE_BYTES)}
    try:
        container = av.open(
            AskedFile(channel, clock), "r", options=options, metadata_errors="replace"
        )
    except av.FFmpegError as error:
        detail = f"none of {CONTAINERS} that can be read front to back: {describe(error)}"
        raise VideoError("not_a_video", detail) from error
    with contextlib.closing(container):
        stream = _video_stream(container, max_pixels)
        convert, aspect = RgbConverter(), pixel_aspect(stream)
        for frame, time_s in _timed(_frames(container, stream, max_pixels)):
            pixels = upright_pixels(convert(frame), round(frame.rotation / 90), aspect, prep)
            channel.send({"time_s": time_s}, pixels.data.cast("B"))


def _video_stream(container: Any, max_pixels: int) -> av.VideoStream:
    if not container.streams.video:
        raise VideoError("no_video", f"{len(container.streams)} streams, none of them video")
    stream: av.VideoStream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        raise VideoError("unsupported_codec", "no decoder for the video stream is allowed")
    limit_decoder(stream, max_pixels)
    return stream


def _frames(container: Any, stream: av.VideoStream, max_pixels: int) -> Iterator[av.VideoFrame]:
    """Frames in the order shown; after damage, none until the next key frame."""
    waiting, failures = False, 0
    packets = container.demux(stream)
    while failures < READ_TRIES:
        try:
            for packet in packets:
                failures = 0
                try:
                    frames = stream.codec_context.decode(packet if packet.size else None)
                except av.FFmpegError:
                    waiting = True
                    continue
                for frame in frames:
                    if frame.width * frame.height > max_pixels:
                        raise VideoError("too_many_pixels", f"{frame.width}x{frame.height}")
                    waiting = (waiting or frame.is_corrupt) and not frame.key_frame
                    if not waiting:
                        yield frame
            return
        except av.FFmpegError:
            failures += 1
            packets = container.demux(stream)


def _timed(frames: Iterator[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, float]]:
    """(frame, seconds since the first)."""
    first: float | None = None
    for frame in frames:
        stamp = float(frame.time if frame.time is not None else 0.0)
        first = stamp if first is None else first
        yield frame, stamp - first
