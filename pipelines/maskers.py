"""The masks of a run, whatever its modality: arrays of token numbers under the batch's names.

Shape suffixes: B samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.config import MaskConfig, PretrainConfig, VideoMaskConfig
from pipelines.masking import I32, U64, legacy_masks, mask_lengths, multiblock_masks
from pipelines.masking_video import legacy_video_masks, video_mask_lengths, video_masks

MASK_NAMES = ("context_ids", "target_ids")
Masks = dict[str, I32]
"""What a batch holds: `context_ids` [B, K] and `target_ids` [B, M, T] of images; of clips, for
every generator g, `context_ids_g` [B, K] and `target_ids_g` [B, T]. int32, ascending."""


class Masker(Protocol):
    """Draws masks for samples of one token grid."""

    @property
    def legacy(self) -> bool:
        """Whether masks belong to batches (`for_batch`) instead of samples (`for_samples`)."""

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `masking.sample_keys`."""

    def for_batch(self, key: np.uint64, batch: int) -> Masks:
        """The original collator's masks of a whole global batch."""


@dataclass(frozen=True)
class ImageMasker:
    """I-JEPA's masks."""

    grid: int
    """Patches on a side."""
    cfg: MaskConfig

    @property
    def legacy(self) -> bool:
        """Whether masks belong to batches instead of samples."""
        return self.cfg.truncate == "legacy"

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""
        if not self.legacy:
            mask_lengths(self.grid, self.cfg)

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `masking.sample_keys`."""
        context_BK, target_BMT = multiblock_masks(keys_B, self.grid, self.cfg)
        return {"context_ids": context_BK, "target_ids": target_BMT}

    def for_batch(self, key: np.uint64, batch: int) -> Masks:
        """The original collator's masks of a whole global batch."""
        context_BK, target_BMT = legacy_masks(key, batch, self.grid, self.cfg)
        return {"context_ids": context_BK, "target_ids": target_BMT}


@dataclass(frozen=True)
class ClipMasker:
    """V-JEPA's masks."""

    steps: int
    """Time steps of the token grid."""
    grid: int
    """Patches on a side."""
    cfg: VideoMaskConfig

    @property
    def legacy(self) -> bool:
        """Whether masks belong to batches instead of samples."""
        return self.cfg.truncate == "legacy"

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""
        if not self.legacy:
            video_mask_lengths(self.steps, self.grid, self.cfg)

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `masking.sample_keys`."""
        return _by_generator(video_masks(keys_B, self.steps, self.grid, self.cfg))

    def for_batch(self, key: np.uint64, batch: int) -> Masks:
        """The original collator's masks of a whole global batch."""
        return _by_generator(legacy_video_masks(key, batch, self.steps, self.grid, self.cfg))


def _by_generator(masks: list[tuple[I32, I32]]) -> Masks:
    return {
        f"{name}_{g}": ids
        for g, pair in enumerate(masks)
        for name, ids in zip(MASK_NAMES, pair, strict=True)
    }


def make_masker(cfg: PretrainConfig) -> Masker:
    """The masker of a run."""
    model = cfg.model
    grid = model.image_size // model.patch_size
    if cfg.modality == "image":
        return ImageMasker(grid, cfg.mask)
    return ClipMasker(model.frames // model.tubelet, grid, cfg.video_mask)
