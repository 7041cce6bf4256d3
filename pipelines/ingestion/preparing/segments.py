"""Turns timed frames into segments: constant frame rate by timestamps, one encoded file each.

A segment is an MP4 of its own that starts with a key frame; frame i of it is shown at i / fps, and
it is decoded in the order shown (no B-frames), so that one seek reaches any frame. Files and live
streams go through the same `Segmenter`; it holds one frame and one encoded segment.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from models.media.video.containers import VideoError, describe
from models.media.video.video_reader import TimedFrame
from models.media.videos import SCALING, U8, RgbConverter
from pipelines.config.ingest import VideoConfig
from pipelines.ingestion.preparing.images import pixel_moments, target_size
from pipelines.ingestion.preparing.mp4 import REPRODUCIBLE


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A short piece of video at a constant frame rate.

    Attributes:
        video: MP4 file.
        num_frames: number of frames.
        start_s: time of the first frame in the source, in seconds.
        height: pixels, upright.
        width: pixels, upright.
        source_frames: number of the source frame that each frame shows.
        moments: means of pixels and of squared pixels over some of the frames (`pixel_moments`).
    """

    video: bytes
    num_frames: int
    start_s: float
    height: int
    width: int
    source_frames: list[int]
    moments: list[float]


class Segmenter:
    """Resamples frames to a constant rate and cuts them into segments.

    Frame k of a run is shown k / fps after the run's first frame. It is the source frame nearest
    to that time. If there is none within half a frame, the last frame is shown again.

    Args:
        cfg: frame rate, length and encoding of the segments.
        short_side: largest allowed short side, pixels; None keeps the size.
    """

    def __init__(self, cfg: VideoConfig, short_side: int | None) -> None:
        self._cfg, self._short_side = cfg, short_side
        self._tick = 1 / rate_of(cfg)
        self._length = round(cfg.fps * cfg.segment_seconds)
        self._convert = RgbConverter()
        self._held: TimedFrame | None = None
        self._pixels: U8 | None = None  # of the held frame, once it has been shown
        self._origin, self._shown, self._gap = Fraction(0), 0, Fraction(0)
        self._encoder: SegmentEncoder | None = None

    def push(self, frame: TimedFrame) -> Iterator[Segment]:
        """Takes the next frame and yields the segments that it completes.

        Raises:
            VideoError: `encode_error`.
        """
        if self._held is not None and self._breaks(self._held, frame):
            yield from self.finish()
        if self._held is None:
            self._origin, self._shown, self._gap = frame.time, 0, Fraction(0)
        else:
            self._gap = min(frame.time - self._held.time, self._tick)
            yield from self._show_until(frame.time - self._gap / 2)
        self._held, self._pixels = frame, None

    def finish(self) -> Iterator[Segment]:
        """Ends the run: yields the last segment, if any; the next frame starts a new run.

        Raises:
            VideoError: `encode_error`.
        """
        if self._held is None:
            return
        # Some files give their last frame hardly any time.
        stays = max(min(self._held.duration, Fraction(self._cfg.max_gap)), self._gap)
        end = self._held.time + stays - self._tick / 2
        if self._shown == 0:
            end = max(end, self._origin + self._tick / 2)  # one frame is shown in any case
        yield from self._show_until(end)
        if self._encoder is not None:
            yield self._encoder.close()
        self._held = self._pixels = self._encoder = None

    def _breaks(self, held: TimedFrame, frame: TimedFrame) -> bool:
        follows = 0 <= frame.time - held.time <= self._cfg.max_gap
        size = (held.frame.width, held.frame.height)
        return frame.after_loss or not follows or size != (frame.frame.width, frame.frame.height)

    def _show_until(self, end: Fraction) -> Iterator[Segment]:
        """Repeats the last frame at all times of the constant rate before `end`."""
        held = self._held
        assert held is not None
        while (time := self._origin + self._shown * self._tick) < end:
            if self._pixels is None:
                self._pixels = self._upright(held)
            if self._encoder is None:
                self._encoder = SegmentEncoder(self._cfg, self._pixels.shape[:2], time)
            self._encoder.add(self._pixels, held.index)
            self._shown += 1
            if self._encoder.num_frames == self._length:
                yield self._encoder.close()
                self._encoder = None

    def _upright(self, timed: TimedFrame) -> U8:
        """Returns RGB [H, W, 3] as a player shows it: square pixels, rotated, even sides."""
        frame = timed.frame
        square = max(round(frame.width * timed.aspect), 1)
        width, height = target_size(square, frame.height, self._short_side)
        pixels = self._convert(frame, even(width), even(height))
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def even(side: int) -> int:
    """Rounds down to an even number of pixels, which H.264's halved colour planes need."""
    return max(side - side % 2, 2)


def rate_of(cfg: VideoConfig) -> Fraction:
    """Returns the exact frame rate: 29.97 is 2997/100."""
    return Fraction(str(cfg.fps))


class SegmentEncoder:
    """Encodes the frames of one segment; the same frames and settings give the same bytes.

    Args:
        cfg: the encoding.
        shape: height and width of the frames.
        start: time of the first frame in the source, seconds.
    """

    def __init__(self, cfg: VideoConfig, shape: tuple[int, ...], start: Fraction) -> None:
        self._cfg, self._start = cfg, start
        self._height, self._width = shape
        self._buffer = io.BytesIO()
        self._container = av.open(
            self._buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}
        )
        rate = rate_of(cfg)
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height = self._width, self._height
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = 1 / rate
        self._stream.options = {
            **{"preset": cfg.preset, "crf": str(cfg.crf), "threads": "1", "bf": "0"},
            "x264-params": f"keyint={cfg.key_frame_every}:scenecut=0:open-gop=0:{REPRODUCIBLE}",
        }
        self._reformatter = VideoReformatter()
        self._sources: list[int] = []
        self._moments: list[list[float]] = []

    @property
    def num_frames(self) -> int:
        """Number of frames taken so far."""
        return len(self._sources)

    def add(self, pixels_HW3: U8, source_frame: int) -> None:
        """Takes one RGB frame.

        Raises:
            VideoError: `encode_error`.
        """
        if self.num_frames % self._cfg.key_frame_every == 0:
            self._moments.append(pixel_moments(Image.fromarray(pixels_HW3)))
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels_HW3, "rgb24"),
            format="yuv420p",
            interpolation=SCALING,
        )
        frame.pts, frame.time_base = self.num_frames, 1 / rate_of(self._cfg)
        self._encode(frame)
        self._sources.append(source_frame)

    def _encode(self, frame: av.VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except av.FFmpegError as error:  # sides or rates that H.264 or MP4 cannot hold
            raise VideoError("encode_error", describe(error)) from error

    def close(self) -> Segment:
        """Finishes the file.

        Raises:
            VideoError: `encode_error`.
        """
        self._encode(None)
        self._container.close()
        moments = np.mean(self._moments, axis=0)
        return Segment(
            video=self._buffer.getvalue(),
            num_frames=self.num_frames,
            start_s=float(self._start),
            height=self._height,
            width=self._width,
            source_frames=self._sources,
            moments=[float(value) for value in moments],
        )
