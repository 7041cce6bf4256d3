"""Encoded video to RGB frames: opening it safely, and single frames by their number.

Needs PyAV (which bundles FFmpeg) and numpy only. Files are opened by content, never by name, and
only as one of `CONTAINERS`: FFmpeg's playlist formats would otherwise make a hostile file a list of
other files and addresses to open.

Array suffixes: T frames, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, BinaryIO, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

MAX_PIXELS = 16_777_216
LEAST_ASPECT = Fraction(1, 8)  # of a pixel; beyond it, either way, is nonsense

# FFmpeg's names of the demuxers, as its whitelist wants them.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"

# The same results on every processor. ACCURATE_RND as well would darken RGB by 2 levels of 255.
SCALING = Interpolation.BICUBIC | Interpolation.BITEXACT

# Of a Matroska stream, by its usual writers: when it ends. Not `Fraction`'s own syntax, in which a
# few bytes of exponent are a number of gigabytes.
CLOCK_TIME = re.compile(r"([0-9]{1,6}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]{1,12})?)")

U8 = npt.NDArray[np.uint8]
Packet: TypeAlias = "av.Packet[Any]"  # generic in its stub only


class VideoError(ValueError):
    """A video that cannot be used.

    Attributes:
        reason: one of `empty`, `not_a_video`, `no_video`, `truncated`, `too_many_pixels`,
            `too_long`, `decode_error`, `no_such_frame`, `encode_error`, `bad_sidecar`; short and
            stable, for counting.
        detail: what went wrong, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        """Crosses process borders with both fields."""
        return type(self), (self.reason, self.detail)


@contextlib.contextmanager
def open_video(
    file: BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Any, av.VideoStream]]:
    """Opens a video file for decoding in one thread; a context manager.

    Args:
        file: seekable and binary; it is not closed.
        max_pixels: refuse larger frames, by the header, before decoding one.

    Yields:
        The PyAV container and its first video stream (cover pictures do not count).

    Raises:
        VideoError: `empty`, `not_a_video`, `truncated`, `no_video` or `too_many_pixels`.
    """
    container = _open(file)
    try:
        with contextlib.closing(container):
            yield container, _video_stream(container, max_pixels)
    except av.FFmpegError as error:
        raise VideoError("decode_error", describe(error)) from error


def _open(file: BinaryIO) -> Any:
    head = file.read(16)
    if not head:
        raise VideoError("empty", "zero bytes")
    file.seek(0)
    try:
        # Subtitles and data streams may lie anywhere in the encoding; none of it is wanted.
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
    """Whether an MP4 or QuickTime file holds a whole `moov` box, by its top-level boxes."""
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


def _video_stream(container: Any, max_pixels: int) -> av.VideoStream:
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        raise VideoError("no_video", f"{len(container.streams)} streams, none of them video")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError("no_video", "no decoder for the video stream")
    limit_decoder(stream, max_pixels)
    return stream  # type: ignore[no-any-return]


def limit_decoder(stream: av.VideoStream, max_pixels: int) -> None:
    """Makes a stream's decoder run in one thread and refuse frames of more than `max_pixels`.

    Raises:
        VideoError: `too_many_pixels`, by the header.
    """
    context = stream.codec_context
    if context.width * context.height > max_pixels:
        size = f"{context.width}x{context.height}"
        raise VideoError("too_many_pixels", f"{size} is over the limit of {max_pixels} pixels")
    context.thread_count = 1  # the same frames in the same order, and parallel across files
    context.options = {"max_pixels": str(max_pixels)}  # a stream may grow behind its header


def pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width / height of one pixel; 1 where the file says nothing, or nonsense."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if LEAST_ASPECT <= aspect <= 1 / LEAST_ASPECT else Fraction(1)


def declared_seconds(container: Any, stream: av.VideoStream) -> Fraction | None:
    """Returns the length of a video stream by the file's header, None where it does not say.

    Matroska says when the stream ends, and when the file does: the later one counts, of limits too.
    """
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    ends = []
    if written := CLOCK_TIME.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = (Fraction(part) for part in written.groups())
        ends.append(hours * 3600 + minutes * 60 + seconds)
    if container.duration and not container.streams.audio:  # else it may be that of the sound
        ends.append(Fraction(container.duration, av.time_base))
    start = (stream.start_time or 0) * (stream.time_base or Fraction(0))
    return max(ends) - start if ends else None


def describe(error: BaseException) -> str:
    """Returns an error's kind and text on one line, without the name of a file."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {' '.join(str(text).split())}"


class RgbConverter:
    """Decoded frames of any pixel format and size to RGB, the same pixels on every processor."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()  # keeps FFmpeg's scaling tables between frames

    def __call__(self, frame: av.VideoFrame, width: int = 0, height: int = 0) -> U8:
        """Returns uint8 [H, W, 3], resized to `width` x `height` when these are given."""
        rgb = self._reformatter.reformat(
            frame, width or frame.width, height or frame.height, "rgb24", interpolation=SCALING
        )
        return rgb.to_ndarray()  # type: ignore[return-value]


def count_frames(video: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Returns the number of frames of a video, without decoding any.

    Raises:
        VideoError: with the reason.
    """
    with open_video(io.BytesIO(video), max_pixels=max_pixels) as (container, stream):
        return len(_packets(container, stream))


def decode_frames(video: bytes, indices: Sequence[int], *, max_pixels: int = MAX_PIXELS) -> U8:
    """Decodes some frames of a video, and of the others only those they need.

    Frames are numbered from 0 in the order they are shown. For each run of wanted frames decoding
    starts at the key frame before it, so one frame costs at most one group of pictures.

    Args:
        video: the encoded bytes; made for the short segments that ingest stores.
        indices: frame numbers in any order, repeats allowed.
        max_pixels: refuse larger frames, by the header.

    Returns:
        uint8 [T, H, W, 3], one frame an index, in the order of `indices`.

    Raises:
        VideoError: `no_such_frame` for an index out of range (negative ones are), else the reason.
    """
    with open_video(io.BytesIO(video), max_pixels=max_pixels) as (container, stream):
        packets = _packets(container, stream)
        shown = sorted(range(len(packets)), key=lambda n: (_time(packets[n]), n))
        bad = [index for index in indices if not 0 <= index < len(packets)]
        if bad:
            raise VideoError("no_such_frame", f"{bad[:3]} of {len(packets)} frames")
        wanted = sorted({shown[index] for index in indices})
        frames = _decode_packets(stream, packets, wanted)
    if not len(indices):
        return np.zeros((0, stream.height, stream.width, 3), np.uint8)
    return np.stack([frames[shown[index]] for index in indices])


def _packets(container: Any, stream: av.VideoStream) -> list[Packet]:
    """All packets of a stream, encoded, in decoding order; each is one frame."""
    return [p for p in container.demux(stream) if p.size and not p.is_discard]


def _time(packet: Packet) -> int:
    time = packet.pts if packet.pts is not None else packet.dts
    return 0 if time is None else time


def _decode_packets(
    stream: av.VideoStream, packets: list[Packet], wanted: list[int]
) -> dict[int, U8]:
    """Returns the RGB frames of the packets `wanted` (ascending numbers), by packet number."""
    keys = [n for n, packet in enumerate(packets) if packet.is_keyframe] or [0]
    number_of = {_time(packets[n]): n for n in wanted}
    convert, found, position = RgbConverter(), dict[int, U8](), 0
    for number in wanted:
        if number in found:
            continue  # came out while an earlier one was waited for
        key = keys[max(bisect.bisect_right(keys, number) - 1, 0)]
        if key > position:
            stream.codec_context.flush_buffers()
            position = key
        while number not in found:
            if position > len(packets):
                raise VideoError("decode_error", f"packet {number} gave no frame")
            packet = packets[position] if position < len(packets) else None  # None drains
            position += 1
            for frame in stream.codec_context.decode(packet):
                at = number_of.get(_frame_time(frame))
                if at is not None:
                    found[at] = convert(frame)
    return found


def _frame_time(frame: av.VideoFrame) -> int:
    time = frame.pts if frame.pts is not None else frame.dts
    return 0 if time is None else time
