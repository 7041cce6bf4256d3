"""Opens video files safely, chooses their video stream, and reads their header.

Files are opened by content, never by name, and only as one of `CONTAINERS`. With FFmpeg's playlist
formats, a hostile file could name other files and addresses to open.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av

MAX_PIXELS = 16_777_216
LEAST_ASPECT = Fraction(1, 8)
"""Least width / height of a pixel that is believed; its inverse is the largest."""

# FFmpeg's names of the demuxers, in the form of its whitelist.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"

# When a Matroska stream ends, as its usual writers put it. `Fraction`'s own syntax is not allowed,
# because a few bytes of exponent would make a number of gigabytes.
CLOCK_TIME = re.compile(r"([0-9]{1,6}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]{1,12})?)")


class VideoError(ValueError):
    """A video that cannot be used.

    Attributes:
        reason: a short and stable code, for counting: `empty`, `not_a_video`, `no_video`,
            `truncated`, `too_many_pixels`, `too_long`, `decode_error`, `no_such_frame`,
            `encode_error` or `bad_sidecar`.
        detail: a message for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        """Lets the error be pickled with both fields."""
        return type(self), (self.reason, self.detail)


@contextlib.contextmanager
def open_video(
    file: BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Any, av.VideoStream]]:
    """Opens a video file for decoding in one thread, as a context manager.

    Args:
        file: seekable and binary; it is not closed.
        max_pixels: refuse frames that the header says are larger, before decoding one.

    Yields:
        The PyAV container and its video stream by `choose_stream`.

    Raises:
        VideoError: `empty`, `not_a_video`, `truncated`, `no_video` or `too_many_pixels`.
    """
    container = _open(file)
    try:
        with contextlib.closing(container):
            yield container, choose_stream(container, max_pixels)
    except av.FFmpegError as error:
        raise VideoError("decode_error", describe(error)) from error


def _open(file: BinaryIO) -> Any:
    head = file.read(16)
    if not head:
        raise VideoError("empty", "zero bytes")
    file.seek(0)
    try:
        # Text in the metadata may have any encoding; it is not used.
        return av.open(
            file, "r", options={"format_whitelist": CONTAINERS}, metadata_errors="replace"
        )
    except av.FFmpegError as error:
        file.seek(0)
        if head[4:8] == b"ftyp" and not _has_index(file):
            detail = "the file ends before its index (moov)"
            raise VideoError("truncated", detail) from error
        detail = f"none of {CONTAINERS}: {describe(error)}"
        raise VideoError("not_a_video", detail) from error


def _has_index(file: BinaryIO) -> bool:
    """Whether an MP4 or QuickTime file has a complete `moov` box at top level."""
    size = file.seek(0, io.SEEK_END)
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4])
        if length == 1:
            length = int.from_bytes(header[8:16])
        if header[4:8] == b"moov":
            return position + length <= size
        if length < 8:
            break
        position += length
    return False


def choose_stream(container: Any, max_pixels: int) -> av.VideoStream:
    """Returns the video stream that FFmpeg would show, ready for decoding in one thread.

    Cover pictures do not count. Among several streams, one with more than one frame comes first (an
    animated AVIF also has a still picture), then one marked as default, then the one with the most
    pixels, then the first.

    Raises:
        VideoError: `no_video`, or `too_many_pixels` according to the header.
    """
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        raise VideoError("no_video", f"{len(container.streams)} streams, none of them video")
    stream: av.VideoStream = max(streams, key=_prominence)
    if stream.codec_context is None:
        raise VideoError("no_video", "no decoder for the video stream")
    limit_decoder(stream, max_pixels)
    return stream


def _prominence(stream: av.VideoStream) -> tuple[bool, bool, int]:
    context = stream.codec_context
    pixels = context.width * context.height if context is not None else 0
    default = bool(stream.disposition & av.stream.Disposition.default)
    return stream.frames != 1, default, pixels


def limit_decoder(stream: av.VideoStream, max_pixels: int) -> None:
    """Makes a stream's decoder run in one thread and refuse frames of more than `max_pixels`.

    Raises:
        VideoError: `too_many_pixels`, according to the header.
    """
    context = stream.codec_context
    if context.width * context.height > max_pixels:
        size = f"{context.width}x{context.height}"
        raise VideoError("too_many_pixels", f"{size} is over the limit of {max_pixels} pixels")
    context.thread_count = 1  # the same frames in the same order, and parallel across files
    # Later frames may be larger than the header says.
    context.options = {"max_pixels": str(max_pixels)}


def pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Returns width / height of a pixel; 1 if the file does not give it, or an impossible one."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if LEAST_ASPECT <= aspect <= 1 / LEAST_ASPECT else Fraction(1)


def declared_seconds(container: Any, stream: av.VideoStream) -> Fraction | None:
    """Returns the length of a video stream according to the header; None if it does not say.

    Matroska says when the stream ends and when the file ends. In a file with no other streams, the
    later one counts; otherwise sound, subtitles or data may go on after the pictures.
    """
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    ends = []
    if written := CLOCK_TIME.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = (Fraction(part) for part in written.groups())
        ends.append(hours * 3600 + minutes * 60 + seconds)
    if container.duration and _is_alone(container, stream):
        ends.append(Fraction(container.duration, av.time_base))
    start = (stream.start_time or 0) * (stream.time_base or Fraction(0))
    return max(ends) - start if ends else None


def _is_alone(container: Any, stream: av.VideoStream) -> bool:
    """Whether no other stream in a container has a length; covers and fonts have none."""
    covers = av.stream.Disposition.attached_pic
    return all(
        other.index == stream.index or other.type == "attachment" or other.disposition & covers
        for other in container.streams
    )


def describe(error: BaseException) -> str:
    """Returns an error's type and text on one line, without a file name."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {' '.join(str(text).split())}"
