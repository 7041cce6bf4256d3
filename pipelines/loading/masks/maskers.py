"""The maskers: one object for each kind of mask, which draws token numbers for a batch.

To add a masker, write a class with the members of `Masker` and enter it in `MASKERS`.

Shape suffixes: B samples, M target blocks of an image, C contexts of an image, K context tokens, T
target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from models.image_size import Grid
from models.keyed_random.arrays import U64
from pipelines.config.data import MaskConfig, VideoMaskConfig
from pipelines.config.objectives import Masks
from pipelines.config.train import PretrainConfig
from pipelines.loading.masks.layouts import Layout
from pipelines.loading.masks.multiblock import I32, legacy_masks, mask_lengths, multiblock_masks
from pipelines.loading.masks.patches import disjoint_masks, random_masks
from pipelines.loading.masks.spacetime import legacy_video_masks, video_mask_lengths, video_masks

MASK_NAMES = ("context_ids", "target_ids")
MaskArrays = dict[str, I32]
"""Token numbers by the names they have in a batch, int32, ascending.

- Images: `context_ids` [B, K] and `target_ids` [B, M, T]; with C contexts an image, [B, C, K] and
  [B, C, T].
- Clips: for every mask generator g, `context_ids_g` [B, K] and `target_ids_g` [B, T].
"""


class Masker(Protocol):
    """Draws masks for the samples of one token grid."""

    @property
    def lists(self) -> Mapping[str, int]:
        """Length of axis 1 of the arrays that have one, by name: lists of tokens a sample."""

    @property
    def legacy(self) -> bool:
        """Whether masks are drawn by batch (`for_batch`) and not by sample (`for_samples`)."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""

    def for_batch(self, key: np.uint64, batch: int) -> MaskArrays:
        """Draws masks as the original collator does, for a whole global batch."""


@dataclass(frozen=True)
class MultiblockMasker:
    """I-JEPA's multi-block masks of images."""

    grid: Grid
    """The patches of an image."""
    cfg: MaskConfig

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> MultiblockMasker:
        """Makes the masker of a run."""
        return cls(cfg.model.grid, cfg.mask)

    @property
    def lists(self) -> Mapping[str, int]:
        """Targets are M blocks, each predicted separately."""
        return {"target_ids": self.cfg.num_targets}

    @property
    def legacy(self) -> bool:
        """Whether masks are drawn for a whole batch, not by sample."""
        return self.cfg.truncate == "legacy"

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """
        if not self.legacy:
            mask_lengths(self.grid, self.cfg)

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        context_BK, target_BMT = multiblock_masks(keys_B, self.grid, self.cfg)
        return {"context_ids": context_BK, "target_ids": target_BMT}

    def for_batch(self, key: np.uint64, batch: int) -> MaskArrays:
        """Draws masks as the original collator does, for a whole global batch."""
        context_BK, target_BMT = legacy_masks(key, batch, self.grid, self.cfg)
        return {"context_ids": context_BK, "target_ids": target_BMT}


@dataclass(frozen=True)
class ClipMasker:
    """V-JEPA's masks of clips."""

    grid: Grid
    """The tokens of a clip."""
    cfg: VideoMaskConfig
    lists: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> ClipMasker:
        """Makes the masker of a run."""
        return cls(cfg.model.grid, cfg.video_mask)

    @property
    def legacy(self) -> bool:
        """Whether masks are drawn for a whole batch, not by sample."""
        return self.cfg.truncate == "legacy"

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """
        if not self.legacy:
            video_mask_lengths(self.grid, self.cfg)

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        return _by_generator(video_masks(keys_B, self.grid, self.cfg))

    def for_batch(self, key: np.uint64, batch: int) -> MaskArrays:
        """Draws masks as the original collator does, for a whole global batch."""
        return _by_generator(legacy_video_masks(key, batch, self.grid, self.cfg))


def _by_generator(masks: list[tuple[I32, I32]]) -> MaskArrays:
    return {
        f"{name}_{g}": ids
        for g, pair in enumerate(masks)
        for name, ids in zip(MASK_NAMES, pair, strict=True)
    }


class _BySample:
    """Base of maskers that have no legacy form."""

    legacy = False

    def for_batch(self, key: np.uint64, batch: int) -> MaskArrays:
        """Raises: these masks are drawn by sample."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomMasker(_BySample):
    """Hides single patches at random, as MAE does: [B, K] visible and [B, 1, T] hidden tokens."""

    count: int
    """Tokens of an image."""
    keep: int
    """K; all others are targets."""
    lists: ClassVar[Mapping[str, int]] = {"target_ids": 1}

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> RandomMasker:
        """Makes the masker of a run."""
        count = cfg.model.grid.per_step
        return cls(count, round(count * (1 - cfg.mask.hidden)))

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """
        if not 0 < self.keep < self.count:
            raise ValueError(f"--mask.hidden: leaves {self.keep} of {self.count} patches visible")

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        context_BK, target_BT = random_masks(keys_B, self.count, self.keep)
        return {"context_ids": context_BK, "target_ids": target_BT[:, None]}


@dataclass(frozen=True)
class DisjointMasker(_BySample):
    """Several contexts with disjoint targets, as in DMJD: [B, C, K] and [B, C, T]."""

    count: int
    """Tokens of an image."""
    contexts: int
    """C."""
    keep: int | None
    """K; None for all tokens that are not the context's targets."""

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> DisjointMasker:
        """Makes the masker of a run."""
        return cls(cfg.model.grid.per_step, cfg.mask.contexts, cfg.mask.context_keep)

    @property
    def lists(self) -> Mapping[str, int]:
        """Both arrays have C lists a sample."""
        return dict.fromkeys(MASK_NAMES, self.contexts)

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """
        targets = self.count // self.contexts
        if not targets:
            raise ValueError(f"--mask.contexts: {self.contexts} cannot share {self.count} patches")
        if self.keep is not None and self.keep > self.count - targets:
            raise ValueError(
                f"--mask.context-keep: {self.keep} is more than the {self.count - targets} patches "
                "that are not targets"
            )

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        masks = disjoint_masks(keys_B, self.count, self.contexts, self.keep)
        return dict(zip(MASK_NAMES, masks, strict=True))


class NoMasker(_BySample):
    """Draws nothing, for objectives that compare whole views."""

    lists: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> NoMasker:
        """Makes the masker of a run."""
        return cls()

    def check(self) -> None:
        """Accepts any settings."""

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Returns no masks."""
        return {}


MASKERS: Mapping[Masks, Callable[[PretrainConfig], Masker]] = {
    "blocks": MultiblockMasker.from_config,
    "clip": ClipMasker.from_config,
    "random": RandomMasker.from_config,
    "disjoint": DisjointMasker.from_config,
    "none": NoMasker.from_config,
}
"""Maskers by the name under which an objective asks for them (`PretrainConfig.masks`)."""


def make_masker(cfg: PretrainConfig) -> Masker:
    """Makes the masker that the run's objective asks for."""
    return MASKERS[cfg.masks](cfg)
