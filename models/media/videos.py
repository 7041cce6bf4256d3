"""Decodes frames of an encoded video, by their numbers, to RGB.

Needs only PyAV, which bundles FFmpeg, and numpy. Opening files and reading their frames is in
`models/media/video/`.

Array suffixes: T frames, H height, W width, 3 = RGB.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

from models.media.video.containers import MAX_PIXELS, VideoError, open_video
from models.media.video.indexed_video import IndexedVideo

SCALING = Interpolation.BICUBIC | Interpolation.BITEXACT
"""Gives the same pixels on every processor. With ACCURATE_RND, RGB would be darker by 2 levels."""

U8 = npt.NDArray[np.uint8]


class RgbConverter:
    """Converts decoded frames of any pixel format and size to RGB, alike on every processor."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()  # keeps FFmpeg's scaling tables between frames

    def __call__(self, frame: av.VideoFrame, width: int = 0, height: int = 0) -> U8:
        """Returns uint8 [H, W, 3], resized to `width` x `height` when these are given."""
        rgb = self._reformatter.reformat(
            frame, width or frame.width, height or frame.height, "rgb24", interpolation=SCALING
        )
        return rgb.to_ndarray()  # type: ignore[return-value]


def count_frames(video: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Returns the number of frames of a video, for ordinary ones without decoding.

    Raises:
        VideoError: the video cannot be read.
    """
    with open_video(io.BytesIO(video), max_pixels=max_pixels) as (container, stream):
        return len(IndexedVideo(container, stream))


def decode_frames(video: bytes, indices: Sequence[int], *, max_pixels: int = MAX_PIXELS) -> U8:
    """Decodes some frames of a video, and only those others that they depend on.

    Frames are numbered from 0 in the order in which they are shown. For each run of wanted frames,
    decoding starts at the key frame before it, so one frame costs at most one group of pictures.

    Args:
        video: the encoded bytes; meant for the short segments that ingest stores.
        indices: frame numbers in any order, repeats allowed.
        max_pixels: refuse frames that the header says are larger.

    Returns:
        uint8 [T, H, W, 3], one frame for each index, in the order of `indices`.

    Raises:
        VideoError: `no_such_frame` for an index out of range, including negative ones; otherwise
            the reason why the video cannot be decoded.
    """
    convert, found = RgbConverter(), dict[int, U8]()
    with open_video(io.BytesIO(video), max_pixels=max_pixels) as (container, stream):
        for number, frame in IndexedVideo(container, stream).frames(indices):
            found[number] = convert(frame)
        if not found:
            return np.zeros((0, stream.height, stream.width, 3), np.uint8)
    if len({pixels_HW3.shape for pixels_HW3 in found.values()}) > 1:
        raise VideoError("decode_error", "the size of the picture changes between these frames")
    return np.stack([found[index] for index in indices])
