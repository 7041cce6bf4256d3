"""Samples frames of a client's video at chosen times, transformed for the encoder.

This runs in a decoder process (`serve/embeddings/media/decode_worker.py`), so a hostile file may
crash it.

Shape legend: T sampled frames, H and W height and width of the encoder's input, 3 = RGB.
"""

from __future__ import annotations

import bisect
import io
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from models.media.preprocessing import Preprocessing, eval_transform
from models.media.video.containers import VideoError, declared_seconds, open_video
from models.media.video.indexed_video import IndexedVideo
from models.media.videos import RgbConverter

# Codecs that cameras, phones, browsers and editors write. FFmpeg has hundreds of other decoders,
# some of which are little tested.
CODECS = (
    frozenset(("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "gif"))
    | frozenset(("mpeg4", "msmpeg4", "h263", "mpeg2video", "mpeg1video", "mjpeg", "png"))
    | frozenset(("prores", "theora", "ffv1"))
)
SHORTFALL_S = 0.5  # a video shorter than its header says by more than this is truncated
TIME_SLACK_S = 1e-4  # containers round the times of frames

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Which frames of a video to take, and the limits."""

    frames: int
    """Frames to take evenly over the range if there is no `fps`."""
    fps: float | None = None
    """Frames to take in each second instead."""
    start_s: float = 0.0
    """Start of the range in seconds after the first frame."""
    end_s: float | None = None
    """End of the range; None means the video's end."""
    max_frames: int
    """Frames to sample at most."""
    max_source_frames: int
    """Frames that the file may hold at most."""
    max_pixels: int
    """Pixels of a frame at most."""
    max_s: float
    """Seconds that the video may last at most."""
    one_size: bool = False
    """Whether frames of another size are stretched to that of the first one, because a clip has one
    grid."""


class SampledFrames(NamedTuple):
    """Frames of a video, fitted to the encoder's input."""

    pixels_THWC: U8
    """uint8 [T, H, W, 3]."""
    times_s: list[float]
    """When each is shown, seconds after the first frame of the video."""
    duration_s: float
    """Duration of the video."""
    size: tuple[int, int]
    """Height and width of the first one before it was fitted, pixels."""


def sample_video(video: bytes, request: ClipRequest, prep: Preprocessing) -> SampledFrames:
    """Decodes and transforms the frames that a request asks for.

    Raises:
        VideoError: with the reason.
    """
    convert, found = RgbConverter(), dict[int, U8]()
    first: tuple[int, int] | None = None
    with open_video(io.BytesIO(video), max_pixels=request.max_pixels) as (container, stream):
        index = read_index(container, stream, request)
        duration_s, times_s = float(index.duration), [float(time) for time in index.times]
        numbers = [
            max(bisect.bisect_right(times_s, time + TIME_SLACK_S) - 1, 0)
            for time in sample_times(duration_s, request)
        ]
        for number, frame in index.frames(numbers):
            image = upright(convert(frame), round(frame.rotation / 90), index.aspect)
            first = first or image.size
            if request.one_size and image.size != first:
                image = image.resize(first)
            found[number] = eval_transform(image, prep)
    assert first is not None, "there is at least one frame"
    pixels = np.stack([found[number] for number in numbers])
    shown_s = [times_s[number] for number in numbers]
    return SampledFrames(pixels, shown_s, duration_s, (first[1], first[0]))


def sample_times(duration_s: float, request: ClipRequest) -> list[float]:
    """Returns the times of the frames: middles of equal parts of the range, or at a constant rate.

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


def read_index(container: Any, stream: av.VideoStream, request: ClipRequest) -> IndexedVideo:
    """Indexes the frames of an open video.

    Raises:
        VideoError: a limit is exceeded, or the file ends earlier than its header says.
    """
    if stream.codec_context.name not in CODECS:
        raise VideoError("unsupported_codec", f"{stream.codec_context.name} is not decoded")
    declared_s = float(declared_seconds(container, stream) or 0)
    if declared_s > request.max_s:
        raise VideoError("too_long", f"{declared_s:g} s is over the limit of {request.max_s:g}")
    index = IndexedVideo(container, stream, most=request.max_source_frames)
    if not len(index):
        raise VideoError("empty", "no frames")
    duration_s = float(index.duration)
    if duration_s > request.max_s:
        raise VideoError("too_long", f"{duration_s:g} s is over the limit of {request.max_s:g} s")
    period_s = duration_s - float(index.times[-1])
    if declared_s - duration_s > max(SHORTFALL_S, 2 * period_s):
        raise VideoError("truncated", f"{duration_s:.3f} of {declared_s:.3f} s are there")
    return index


def upright(frame_HW3: U8, rotation: int, aspect: Fraction) -> Image.Image:
    """Returns a decoded frame as a player shows it, upright and with square pixels."""
    image = Image.fromarray(frame_HW3)
    if aspect != 1:
        image = image.resize((max(round(image.width * aspect), 1), image.height))
    if rotation % 4:
        image = Image.fromarray(np.rot90(np.asarray(image), rotation))
    return image
