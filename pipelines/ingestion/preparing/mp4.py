"""Writes frames to an MP4 file, for footage that this project makes itself."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from models.media.videos import SCALING

# x264's code for newer processors than these gives other bytes than its plain C, and with widths
# that are no multiple of 16 now and then other bytes in the same run. This much equals plain C, and
# costs 8% more time.
REPRODUCIBLE = "asm=MMX2,SSE2,SSE2Fast"


class Mp4Writer:
    """An MP4 at a constant frame rate that appears under its name when it is complete.

    Args:
        path: of the file.
        rate: frames a second.
        crf: H.264 quality, 0 being lossless.
    """

    def __init__(self, path: Path, rate: Fraction, crf: int = 16) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._part = path, path.with_suffix(".part")
        self._file = av.open(
            str(self._part), "w", format="mp4", container_options={"fflags": "+bitexact"}
        )
        self._stream = self._file.add_stream("libx264", rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = 1 / rate
        self._stream.options = {
            **{"crf": str(crf), "preset": "veryfast", "threads": "1"},
            "x264-params": REPRODUCIBLE,
        }
        self._reformatter = VideoReformatter()
        self.num_frames = 0

    def add(self, pixels_HW3: npt.NDArray[np.uint8]) -> None:
        """Takes one RGB frame of even sides, all of one size."""
        if self.num_frames == 0:
            self._stream.height, self._stream.width = pixels_HW3.shape[:2]
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HW3), "rgb24"),
            format="yuv420p",
            interpolation=SCALING,
        )
        frame.pts, frame.time_base = self.num_frames, self._stream.codec_context.time_base
        self._file.mux(self._stream.encode(frame))
        self.num_frames += 1

    def close(self) -> None:
        """Completes the file."""
        self._file.mux(self._stream.encode(None))
        self._file.close()
        self._part.rename(self._path)


def save_array(path: Path, values: npt.NDArray[np.float32]) -> None:
    """Writes a sidecar that appears under its name when it is complete."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, values)
    part.rename(path)
