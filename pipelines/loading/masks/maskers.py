"""The maskers: one object for each kind of mask, which draws token numbers for a batch.

To add a masker, write a class with the members of `Masker` and enter it in `MASKERS`. If samples
may lack tokens or have grids of their own, it knows the run's `crops`, and chooses the lengths of
lists by them.

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
from pipelines.loading.masks.layouts import CropSettings, Layout, calibration_layout
from pipelines.loading.masks.multiblock import I32, legacy_masks, mask_lengths, multiblock_masks
from pipelines.loading.masks.partial import (
    Lengths,
    check_lengths,
    partial_block_lengths,
    partial_clip_lengths,
    partial_disjoint_masks,
    partial_multiblock_masks,
    partial_random_masks,
    partial_video_masks,
    reached_patches,
)
from pipelines.loading.masks.patches import disjoint_masks, random_masks
from pipelines.loading.masks.spacetime import legacy_video_masks, video_mask_lengths, video_masks

MASK_NAMES = ("context_ids", "target_ids")
MaskArrays = dict[str, I32]
"""Token numbers by the names they have in a batch, int32, ascending; see `Layout.kept_ids`.

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
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`).

        Args:
            keys_B: the keys.
            layout: the tokens of the samples; None if all have the encoder's whole grid.
        """

    def for_batch(self, key: np.uint64, batch: int) -> MaskArrays:
        """Draws masks as the original collator does, for a whole global batch."""


@dataclass(frozen=True)
class MultiblockMasker:
    """I-JEPA's multi-block masks of images."""

    grid: Grid
    """The patches of an image."""
    cfg: MaskConfig
    crops: CropSettings | None = None

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> MultiblockMasker:
        """Makes the masker of a run."""
        return cls(cfg.model.grid, cfg.mask, _crops(cfg))

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
        if self.legacy:
            _refuse_legacy("mask", self.crops)
            return
        mask_lengths(self.grid, self.cfg)
        if self.crops:
            partial_block_lengths(self.cfg, self.crops)

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        if layout is not None:
            lengths = partial_block_lengths(self.cfg, _known(self.crops))
            drawn = partial_multiblock_masks(keys_B, layout, self.cfg, lengths)
            return dict(zip(MASK_NAMES, drawn, strict=True))
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
    crops: CropSettings | None = None
    lists: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> ClipMasker:
        """Makes the masker of a run."""
        return cls(cfg.model.grid, cfg.video_mask, _crops(cfg))

    @property
    def legacy(self) -> bool:
        """Whether masks are drawn for a whole batch, not by sample."""
        return self.cfg.truncate == "legacy"

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """
        if self.legacy:
            _refuse_legacy("video-mask", self.crops)
            return
        video_mask_lengths(self.grid, self.cfg)
        if self.crops:
            partial_clip_lengths(self.cfg, self.crops)

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        if layout is not None:
            lengths = partial_clip_lengths(self.cfg, _known(self.crops))
            drawn = partial_video_masks(keys_B, layout, self.cfg, self.grid.tubes, lengths)
            return _by_generator(drawn)
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
    crops: CropSettings | None = None
    lists: ClassVar[Mapping[str, int]] = {"target_ids": 1}

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> RandomMasker:
        """Makes the masker of a run."""
        count = cfg.model.grid.per_step
        return cls(count, round(count * (1 - cfg.mask.hidden)), _crops(cfg))

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """
        if not 0 < self.keep < self.count:
            raise ValueError(f"--mask.hidden: leaves {self.keep} of {self.count} patches visible")
        if self.crops:
            self._partial_lengths()

    def _partial_lengths(self) -> Lengths:
        """Returns the lengths where samples may lack tokens, in the same proportion."""
        count = reached_patches(_known(self.crops))
        keep = round(count * self.keep / self.count)
        return check_lengths(keep, count - keep)

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        if layout is not None:
            context_BK, target_BT = partial_random_masks(keys_B, layout, self._partial_lengths())
            return {"context_ids": context_BK, "target_ids": target_BT[:, None]}
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
    crops: CropSettings | None = None

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> DisjointMasker:
        """Makes the masker of a run."""
        return cls(cfg.model.grid.per_step, cfg.mask.contexts, cfg.mask.context_keep, _crops(cfg))

    @property
    def lists(self) -> Mapping[str, int]:
        """Both arrays have C lists a sample."""
        return dict.fromkeys(MASK_NAMES, self.contexts)

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: no mask can be drawn; the flag is named.
        """
        self._lengths(self.count)
        if self.crops:
            self._lengths(reached_patches(self.crops))

    def _lengths(self, count: int) -> Lengths:
        """Returns K and T for images of this many patches.

        Raises:
            ValueError: there are too few; the flag is named.
        """
        targets = count // self.contexts
        if not targets:
            raise ValueError(f"--mask.contexts: {self.contexts} cannot share {count} patches")
        if self.keep is not None and self.keep > count - targets:
            raise ValueError(
                f"--mask.context-keep: {self.keep} is more than the {count - targets} patches "
                "that are not targets"
            )
        return self.keep or count - targets, targets

    def for_samples(self, keys_B: U64, layout: Layout | None = None) -> MaskArrays:
        """Draws masks, fixed by the samples' keys (`keyed_random.arrays.sample_keys`)."""
        if layout is not None:
            lengths = check_lengths(*self._lengths(reached_patches(_known(self.crops))))
            drawn = partial_disjoint_masks(keys_B, layout, self.contexts, lengths)
            return dict(zip(MASK_NAMES, drawn, strict=True))
        masks = disjoint_masks(keys_B, self.count, self.contexts, self.keep)
        return dict(zip(MASK_NAMES, masks, strict=True))


@dataclass(frozen=True)
class NoMasker(_BySample):
    """Draws nothing, for objectives that compare whole views."""

    crops: CropSettings | None = None
    lists: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> NoMasker:
        """Makes the masker of a run."""
        return cls(_crops(cfg))

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: the regions that are left out leave too little of a picture.
        """
        if self.crops:
            calibration_layout(self.crops)

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


def _crops(cfg: PretrainConfig) -> CropSettings | None:
    """Returns the settings by which lengths are chosen; None if all samples have the whole grid."""
    return CropSettings(cfg.model, cfg.data) if cfg.model.partial else None


def _known(crops: CropSettings | None) -> CropSettings:
    if crops is None:
        raise ValueError("a layout needs a masker that was made for samples that lack tokens")
    return crops


def _refuse_legacy(group: str, crops: CropSettings | None) -> None:
    """Raises: the original's masks are drawn on one whole grid."""
    if crops is not None:
        cause = "--model.exclude" if crops.model.exclude else "--model.fit whole"
        raise ValueError(f"--{group}.truncate legacy: draws on one whole grid; not with {cause}")
