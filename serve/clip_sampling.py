"""Frames of a client's video at chosen times, as the encoder wants them.

Runs in a decoder process (`serve/decode_worker.py`): nothing here need survive a hostile file.

Shape legend: T sampled frames, S side of the encoder's square input, 3 = RGB.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import math
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from models.preprocessing import Preprocessing, eval_transform
from models.video_decode import (
    VideoError,
    declared_seconds,
    decode_frames,
    open_video,
    pixel_aspect,
)

# What cameras, phones, browsers and editors write. FFmpeg has hundreds of other decoders, some of
# them little tested.
CODECS = (
    frozenset(("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "gif"))
    | frozenset(("mpeg4", "msmpeg4v3", "h263", "mpeg2video", "mpeg1video", "mjpeg", "png"))
    | frozenset(("prores", "theora", "ffv1"))
)
GROUP_BYTES = 67_108_864  # full-size RGB held at once
SHORTFALL_S = 0.5  # missing at the end of what the header says that counts as truncated
TIME_SLACK_S = 1e-4  # a frame at 0.1 s as its container rounds it is the frame at 0.1 s

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Which frames of a video to take, and what it may cost."""

    frames: int
    """How many, evenly over the range, when no `fps` is given."""
    fps: float | None = None
    """Take frames at this rate instead."""
    start_s: float = 0.0
    """Start of the range, seconds after the first frame."""
    end_s: float | None = None
    """End of the range; None is the video's."""
    max_frames: int
    """Refuse to sample more."""
    max_source_frames: int
    """Refuse a video that holds more."""
    max_pixels: int
    """Refuse larger frames."""
    max_s: float
    """Refuse a longer video."""


@dataclass(frozen=True, kw_only=True)
class VideoIndex:
    """What a video holds, found without decoding more than its first frame.

    Attributes:
        times_s: when each frame is shown, seconds after the first, sorted.
        duration_s: the last frame's time included.
        rotation: quarter turns counter-clockwise that make a frame upright.
        aspect: width / height of a pixel.
        frame_bytes: RGB bytes of one frame.
    """

    times_s: list[float]
    duration_s: float
    rotation: int
    aspect: Fraction
    frame_bytes: int


def sample_video(
    video: bytes, request: ClipRequest, prep: Preprocessing
) -> tuple[U8, list[float], float]:
    """Decodes and transforms the frames a request asks for.

    Returns:
        uint8 [T, S, S, 3], the time of each of them, and the video's duration, both in seconds.

    Raises:
        VideoError: with the reason.
    """
    index = read_index(video, request)
    numbers = [
        max(bisect.bisect_right(index.times_s, time + TIME_SLACK_S) - 1, 0)
        for time in sample_times(index.duration_s, request)
    ]
    pixels = np.stack(_transformed(video, numbers, index, request, prep))
    return pixels, [index.times_s[number] for number in numbers], index.duration_s


def sample_times(duration_s: float, request: ClipRequest) -> list[float]:
    """Times to take frames at: the middles of equal parts of the range, or a constant rate from
    its start.

    Raises:
        VideoError: `no_such_time`, `too_many_frames`.
    """
    start, end = request.start_s, min(request.end_s or math.inf, duration_s)
    if start >= end:
        raise VideoError("no_such_time", f"starts at {start:g} s of {duration_s:g} s")
    length = end - start
    if request.fps is None:
        return [start + (i + 0.5) * length / request.frames for i in range(request.frames)]
    count = max(math.floor(length * request.fps + TIME_SLACK_S), 1)
    if count > request.max_frames:
        detail = f"{length:g} s at {request.fps:g} frames/s are {count}, over {request.max_frames}"
        raise VideoError("too_many_frames", detail)
    return [start + i / request.fps for i in range(count)]


def read_index(video: bytes, request: ClipRequest) -> VideoIndex:
    """Reads the times of all frames from their packets.

    Raises:
        VideoError: a limit is passed, or the file ends before its header says.
    """
    with open_video(io.BytesIO(video), max_pixels=request.max_pixels) as (container, stream):
        if stream.codec_context.name not in CODECS:
            raise VideoError("unsupported_codec", f"{stream.codec_context.name} is not decoded")
        declared_s = float(declared_seconds(container, stream) or 0)
        if declared_s > request.max_s:
            raise VideoError("too_long", f"{declared_s:g} s is over the limit of {request.max_s:g}")
        stamps, rotation, period = _scan(container, stream, request.max_source_frames)
        base, rate = stream.time_base or Fraction(1, 1000), stream.average_rate or Fraction(25)
        aspect = pixel_aspect(stream)
        frame_bytes = 3 * stream.width * stream.height
    stamps.sort()
    if stamps[0] == stamps[-1]:  # no times at all
        stamps, base = list(range(len(stamps))), 1 / rate
    times_s = [float((stamp - stamps[0]) * base) for stamp in stamps]
    period_s = float(period * base) or float(1 / rate)
    duration_s = times_s[-1] + period_s
    if duration_s > request.max_s:
        raise VideoError("too_long", f"{duration_s:g} s is over the limit of {request.max_s:g} s")
    if declared_s - duration_s > max(SHORTFALL_S, 2 * period_s):
        raise VideoError("truncated", f"{duration_s:.3f} of {declared_s:.3f} s are there")
    return VideoIndex(
        times_s=times_s,
        duration_s=duration_s,
        rotation=rotation,
        aspect=aspect,
        frame_bytes=frame_bytes,
    )


def _scan(
    container: av.container.InputContainer, stream: av.VideoStream, most: int
) -> tuple[list[int], int, int]:
    """Stamps of all packets (as `decode_frames` counts them), quarter turns, last duration."""
    stamps: list[int] = []
    rotation: int | None = None
    period = 0
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        stamps.append(0 if stamp is None else stamp)
        period = packet.duration or period
        if len(stamps) > most:
            raise VideoError("too_many_frames", f"the video holds more than {most} frames")
        if rotation is None:
            with contextlib.suppress(av.FFmpegError):  # met again, and reported, when decoding
                for frame in stream.codec_context.decode(packet):
                    rotation = round(frame.rotation / 90)
    if not stamps:
        raise VideoError("empty", "no frames")
    return stamps, rotation or 0, period


def _transformed(
    video: bytes,
    numbers: list[int],
    index: VideoIndex,
    request: ClipRequest,
    prep: Preprocessing,
) -> list[U8]:
    """Transformed frames, a few full-size ones in memory at a time."""
    wanted = sorted(set(numbers))
    at_once = max(GROUP_BYTES // max(index.frame_bytes, 1), 1)
    found: dict[int, U8] = {}
    for first in range(0, len(wanted), at_once):
        group = wanted[first : first + at_once]
        frames_THW3 = decode_frames(video, group, max_pixels=request.max_pixels)
        for number, frame_HW3 in zip(group, frames_THW3, strict=True):
            found[number] = upright_pixels(frame_HW3, index.rotation, index.aspect, prep)
    return [found[number] for number in numbers]


def upright_pixels(frame_HW3: U8, rotation: int, aspect: Fraction, prep: Preprocessing) -> U8:
    """A decoded frame as a player shows it, by the transform of evaluation: uint8 [S, S, 3]."""
    image = Image.fromarray(frame_HW3)
    if aspect != 1:
        image = image.resize((max(round(image.width * aspect), 1), image.height))
    if rotation % 4:
        image = Image.fromarray(np.rot90(np.asarray(image), rotation))
    return eval_transform(image, prep)
