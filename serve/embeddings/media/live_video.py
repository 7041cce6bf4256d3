"""Decodes a live container (MPEG-TS, Matroska, WebM, fragmented MP4) and transforms its frames.

This runs in a decoder process (`serve/embeddings/media/decode_worker.py`). It asks the replica for
bytes whenever the demuxer needs some, so the replica always knows whether it waits for the source
or for the decoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import av
import numpy as np

from models.media.preprocessing import Preprocessing, eval_transform
from models.media.video.containers import VideoError, choose_stream, describe
from models.media.video.video_reader import FrameReader
from models.media.videos import RgbConverter
from serve.embeddings.media.sample_video import CODECS, upright

# Without playlists, and without formats that need the end of a file first.
CONTAINERS = "mpegts,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"
PROBE_BYTES = 1_000_000  # to find the streams; the default, 5 million, is seconds of a live source
MAX_GAP_S = 5.0  # a time further back begins a new timeline, even without a key frame
TS_SYNC, TS_SIZES = 0x47, (188, 192, 204)
LAST_BYTES = 20 * max(TS_SIZES)
# Bytes after the last packet up to which they may be an index: a number, or a share of the whole.
# More of them count as unreadable.
TAIL_BYTES, TAIL_SHARE = 4096, 50


class Channel(Protocol):
    """The interface of `serve.embeddings.media.decode_worker.Channel`."""

    def send(self, head: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        """Sends one message."""

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Receives one message."""


class AskedFile:
    """A file that is read from front to back and whose bytes come from the replica.

    Args:
        channel: leads to the replica.
        clock: called with False before each wait for the source, which must not count as our time,
            and with True after it.

    Attributes:
        received: bytes that have come.
    """

    def __init__(self, channel: Channel, clock: Callable[[bool], None]) -> None:
        self._channel, self._clock = channel, clock
        self._held = memoryview(b"")
        self._ended = False
        self._last = b""
        self.received = 0

    def read(self, size: int = -1) -> bytes:
        """Returns one byte or more, or none at the end."""
        if not self._held and not self._ended:
            self._channel.send({"need": True})
            self._clock(False)
            _, data = self._channel.receive()
            self._clock(True)
            self._held, self._ended = memoryview(data), not data
            self._last = (self._last + data)[-LAST_BYTES:]
            self.received += len(data)
        piece = self._held[: size if size >= 0 else len(self._held)]
        self._held = self._held[len(piece) :]
        return bytes(piece)

    @property
    def ends_in_transport(self) -> bool:
        """Whether the last bytes are MPEG-TS packets, which may be empty."""
        return any(
            set(self._last[first::size]) == {TS_SYNC}
            for size in TS_SIZES
            for first in range(min(size, len(self._last)))
        )


def decode_stream(
    channel: Channel,
    prep: Preprocessing,
    *,
    clock: Callable[[bool], None],
    max_pixels: int,
) -> None:
    """Sends the pixels of every frame as the transform makes them, uint8 [H, W, 3].

    The head is {"time_s": seconds since the first frame, "picture": [height, width]}, the latter in
    pixels before the transform.

    Args:
        channel: leads to the replica.
        prep: the transform.
        clock: see `AskedFile`.
        max_pixels: pixels of a frame at most.

    Raises:
        VideoError: with the reason; `decode_error` also where the container cannot be read further.
    """
    options = {"format_whitelist": CONTAINERS, "probesize": str(PROBE_BYTES)}
    file = AskedFile(channel, clock)
    try:
        container = av.open(file, "r", options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        detail = f"none of {CONTAINERS} that can be read front to back: {describe(error)}"
        raise VideoError("not_a_video", detail) from error
    with contextlib.closing(container):
        stream = choose_stream(container, max_pixels)
        if stream.codec_context.name not in CODECS:
            raise VideoError("unsupported_codec", f"{stream.codec_context.name} is not decoded")
        source, convert = _Positioned(container), RgbConverter()
        reader = FrameReader(
            source, stream, max_seconds=None, max_pixels=max_pixels, max_gap=MAX_GAP_S
        )
        for timed in reader:
            turns = round(timed.frame.rotation / 90)
            image = upright(convert(timed.frame), turns, timed.aspect)
            head = {"time_s": float(timed.time), "picture": (image.height, image.width)}
            pixels = np.ascontiguousarray(eval_transform(image, prep))
            channel.send(head, pixels.data.cast("B"))
        _check_end(reader, file, source.reached)


class _Positioned:
    """A container for `FrameReader` that remembers the end of its last packet in bytes."""

    def __init__(self, container: Any) -> None:
        self.format, self.streams, self.duration = container.format, container.streams, None
        self.reached = 0
        self._container = container

    def demux(self, stream: av.VideoStream) -> Iterator[Any]:
        """Yields the packets of one stream."""
        for packet in self._container.demux():
            if packet.pos is not None:
                self.reached = max(self.reached, packet.pos + packet.size)
            if packet.stream_index == stream.index:
                yield packet


def _check_end(reader: FrameReader, file: AskedFile, reached: int) -> None:
    """Raises if the stream could not be read further, and not if it ended, even within a packet.

    Most demuxers report foreign bytes as the end, so what follows the last packet is examined.

    Raises:
        VideoError: `decode_error`.
    """
    why, room = reader.unreadable, TAIL_BYTES + reached // TAIL_SHARE
    while not why:
        tail = file.received - reached
        if tail > room and not file.ends_in_transport:
            why = f"its last {tail} bytes hold no picture and no sound"
        elif not file.read(LAST_BYTES):  # the demuxer may have left some bytes unread
            return
    detail = f"the container cannot be read on, front to back: {why}"
    raise VideoError("decode_error", detail)
