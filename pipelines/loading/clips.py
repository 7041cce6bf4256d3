"""Chooses which frames of a stored segment make up a clip; numpy only.

Shape suffixes: B segments, T frames of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.keyed_random.arrays import F64, U64, uniforms
from models.keyed_random.streams import SampleStream
from pipelines.config.data import ClipConfig
from pipelines.config.train import PretrainConfig

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class ClipSampler:
    """Chooses clips of a fixed number of frames at a fixed distance."""

    frames: int
    """T, the number of frames in a clip."""
    settings: ClipConfig

    def random(self, num_frames_B: npt.ArrayLike, fps_B: npt.ArrayLike, keys_B: U64) -> I32:
        """Chooses a random clip of each segment, fixed by its key; the middle one without jitter.

        If a segment is too short, all its frames are taken and the last one is repeated.

        Args:
            num_frames_B: number of frames in each segment.
            fps_B: frames a second of each segment.
            keys_B: `keyed_random.arrays.sample_keys`.

        Returns:
            int32 [B, T], frame numbers, ascending.
        """
        if not self.settings.jitter:
            return self.middle(num_frames_B, fps_B)
        return self._clips(num_frames_B, fps_B, uniforms(keys_B, SampleStream.CLIP, 1)[:, 0])

    def middle(self, num_frames_B: npt.ArrayLike, fps_B: npt.ArrayLike) -> I32:
        """Chooses the clip in the middle of each segment, int32 [B, T], as evaluation does."""
        return self._clips(num_frames_B, fps_B, np.full(np.shape(num_frames_B), 0.5))

    def _clips(self, num_frames_B: npt.ArrayLike, fps_B: npt.ArrayLike, place_B: F64) -> I32:
        count_B = np.asarray(num_frames_B, np.int64)
        step_B = np.full(len(count_B), float(self.settings.stride))
        if self.settings.fps is not None:
            step_B = np.asarray(fps_B, np.float64) / self.settings.fps
        # With rates like 29.97, products may fall just below whole numbers.
        offset_BT = np.floor(np.arange(self.frames) * step_B[:, None] + 1e-6).astype(np.int64)
        starts_B = np.maximum(count_B - offset_BT[:, -1], 1)
        first_B = (place_B * starts_B).astype(np.int64)
        number_BT = np.minimum(first_B[:, None] + offset_BT, count_B[:, None] - 1)
        frames_BT: I32 = number_BT.astype(np.int32)
        return frames_BT


def training_sampler(cfg: PretrainConfig) -> ClipSampler | None:
    """Returns the clip sampler of a run; None if it learns from images."""
    if cfg.modality == "image":
        return None
    return ClipSampler(frames=cfg.clip_frames, settings=cfg.clip)
