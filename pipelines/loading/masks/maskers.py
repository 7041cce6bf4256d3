"""The masks of a run, whatever its objective: arrays of token numbers under the batch's names.

Shape suffixes: B samples, M target blocks of an image, C contexts of an image, K context tokens, T
target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from models.keyed_random.arrays import U64
from pipelines.config.data import MaskConfig, VideoMaskConfig
from pipelines.config.train import PretrainConfig
from pipelines.loading.masks.multiblock import I32, legacy_masks, mask_lengths, multiblock_masks
from pipelines.loading.masks.patches import disjoint_masks, random_masks
from pipelines.loading.masks.spacetime import legacy_video_masks, video_mask_lengths, video_masks

MASK_NAMES = ("context_ids", "target_ids")
Masks = dict[str, I32]
"""What a batch holds: `context_ids` [B, K] and `target_ids` [B, M, T] of images, or both with C
contexts, [B, C, K] and [B, C, T]; of clips, for every generator g, `context_ids_g` [B, K] and
`target_ids_g` [B, T]. int32, ascending."""


class Masker(Protocol):
    """Draws masks for samples of one token grid."""

    @property
    def lists(self) -> Mapping[str, int]:
        """How many lists a sample has under these names: their axis 1; others have no such axis."""

    @property
    def legacy(self) -> bool:
        """Whether masks belong to batches (`for_batch`) instead of samples (`for_samples`)."""

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `keyed_random.arrays.sample_keys`."""

    def for_batch(self, key: np.uint64, batch: int) -> Masks:
        """The original collator's masks of a whole global batch."""


@dataclass(frozen=True)
class ImageMasker:
    """I-JEPA's masks."""

    grid: int
    """Patches on a side."""
    cfg: MaskConfig

    @property
    def lists(self) -> Mapping[str, int]:
        """An image's targets are several blocks, each predicted by itself."""
        return {"target_ids": self.cfg.num_targets}

    @property
    def legacy(self) -> bool:
        """Whether masks belong to batches instead of samples."""
        return self.cfg.truncate == "legacy"

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""
        if not self.legacy:
            mask_lengths(self.grid, self.cfg)

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `keyed_random.arrays.sample_keys`."""
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
    lists: ClassVar[Mapping[str, int]] = {}

    @property
    def legacy(self) -> bool:
        """Whether masks belong to batches instead of samples."""
        return self.cfg.truncate == "legacy"

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""
        if not self.legacy:
            video_mask_lengths(self.steps, self.grid, self.cfg)

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `keyed_random.arrays.sample_keys`."""
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


class _BySample:
    """A masker without the original's collator."""

    legacy = False

    def for_batch(self, key: np.uint64, batch: int) -> Masks:
        """Never asked for."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomMasker(_BySample):
    """Single patches hidden at random (MAE): `context_ids` [B, K] and `target_ids` [B, 1, T]."""

    count: int
    """Tokens of an image."""
    keep: int
    """K; all others are targets."""
    lists: ClassVar[Mapping[str, int]] = {"target_ids": 1}

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""
        if not 0 < self.keep < self.count:
            raise ValueError(f"--mask.hidden: leaves {self.keep} of {self.count} patches visible")

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `keyed_random.arrays.sample_keys`."""
        context_BK, target_BT = random_masks(keys_B, self.count, self.keep)
        return {"context_ids": context_BK, "target_ids": target_BT[:, None]}


@dataclass(frozen=True)
class DisjointMasker(_BySample):
    """Several contexts whose targets share out the image (DMJD): [B, C, K] and [B, C, T]."""

    count: int
    """Tokens of an image."""
    contexts: int
    """C."""
    keep: int | None
    """K; None for all tokens that are not the context's targets."""

    @property
    def lists(self) -> Mapping[str, int]:
        """C of both."""
        return dict.fromkeys(MASK_NAMES, self.contexts)

    def check(self) -> None:
        """Raises a ValueError that names the flag if no mask can be drawn."""
        targets = self.count // self.contexts
        if not targets:
            raise ValueError(f"--mask.contexts: {self.contexts} cannot share {self.count} patches")
        if self.keep is not None and self.keep > self.count - targets:
            raise ValueError(
                f"--mask.context-keep: {self.keep} is more than the {self.count - targets} patches "
                "that are not targets"
            )

    def for_samples(self, keys_B: U64) -> Masks:
        """Masks fixed by `keyed_random.arrays.sample_keys`."""
        masks = disjoint_masks(keys_B, self.count, self.contexts, self.keep)
        return dict(zip(MASK_NAMES, masks, strict=True))


class NoMasker(_BySample):
    """For objectives that compare whole views."""

    lists: ClassVar[Mapping[str, int]] = {}

    def check(self) -> None:
        """Nothing can be wrong."""

    def for_samples(self, keys_B: U64) -> Masks:
        """No masks."""
        return {}


def make_masker(cfg: PretrainConfig) -> Masker:
    """The masker that the run's objective asks for."""
    model, mask = cfg.model, cfg.mask
    grid = model.image_size // model.patch_size
    match cfg.masks:
        case "blocks":
            return ImageMasker(grid, mask)
        case "clip":
            return ClipMasker(model.frames // model.tubelet, grid, cfg.video_mask)
        case "random":
            return RandomMasker(grid * grid, round(grid * grid * (1 - mask.hidden)))
        case "disjoint":
            return DisjointMasker(grid * grid, mask.contexts, mask.context_keep)
        case "none":
            return NoMasker()
