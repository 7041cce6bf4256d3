"""Batches of prepared pictures or clips, and their encoding.

Pictures of one batch may have different grids and keep different patches. Those whose grid is not
the encoder's are stored as strips: their patches, in raster order, side by side, and zeros after
them. Cutting a strip into patches gives the picture's patches in their order.

Shape legend: B images or clips, C = 3 channels, T frames, H and W pixels, M patches of one time
step of the encoder's grid, N tokens of the input, K tokens that one keeps at most, D token width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.encoders.kept_tokens import KeptTokens
from models.encoders.vit import VisionTransformer
from models.image_size import height_width
from models.media.preprocessing import EncoderInput, Preprocessing, normalize


@dataclass(frozen=True)
class InputBatch:
    """Pixels of images or clips, and which of their patches are encoded."""

    pixels: Tensor
    """uint8 [B, C, H, W] or [B, C, T, H, W]: pictures, or strips."""
    grids_B2: Tensor | None = None
    """Rows and columns of each one's grid, int64; None if all have the encoder's, with all of its
    tokens."""
    kept_BM: Tensor | None = None
    """Which patches of a time step are encoded, bool, in raster order of each one's grid."""

    @classmethod
    def of(cls, inputs: Sequence[EncoderInput], prep: Preprocessing) -> InputBatch:
        """Joins inputs with the same number of frames.

        Args:
            inputs: at least one.
            prep: the transform that made them, or the same with other regions.
        """
        pixels = [one.pixels for one in inputs]
        if not prep.partial and all(one.kept is None for one in inputs):
            return cls(_channels_second(pixels))
        patch = prep.patch_size
        assert patch is not None, "whoever made `kept` knew it"
        rows, columns = (side // patch for side in height_width(prep.image_size))
        everything = np.ones((rows, columns), np.bool_)
        masks = [everything if one.kept is None else one.kept for one in inputs]
        if prep.fit == "whole":
            pixels = [_strip(picture, patch, rows * columns) for picture in pixels]
        kept_BM = np.zeros((len(masks), rows * columns), np.bool_)
        for kept_M, mask in zip(kept_BM, masks, strict=True):
            kept_M[: mask.size] = mask.reshape(-1)
        grids_B2 = torch.tensor([mask.shape for mask in masks])
        return cls(_channels_second(pixels), grids_B2, torch.from_numpy(kept_BM))

    @classmethod
    def join(cls, batches: Sequence[InputBatch]) -> InputBatch:
        """Joins batches that were made by one transform."""
        grids = [batch.grids_B2 for batch in batches if batch.grids_B2 is not None]
        kept = [batch.kept_BM for batch in batches if batch.kept_BM is not None]
        return cls(
            torch.cat([batch.pixels for batch in batches]),
            torch.cat(grids) if grids else None,
            torch.cat(kept) if kept else None,
        )

    def __len__(self) -> int:
        """Returns B."""
        return len(self.pixels)

    def __getitem__(self, rows: slice | Tensor | npt.NDArray[Any]) -> InputBatch:
        """Returns some of the images or clips."""
        return self._map(lambda part: part[rows])

    def split(self, size: int) -> list[InputBatch]:
        """Divides the batch into batches of `size`, of which the last may be smaller."""
        return [self[first : first + size] for first in range(0, len(self), size)]

    def to(self, device: torch.device) -> InputBatch:
        """Returns the batch on a device."""
        return self._map(lambda part: part.to(device, non_blocking=True))

    def kept(self, tubelet: int) -> KeptTokens | None:
        """Numbers the tokens that are encoded; None for all of the encoder's grid, in order.

        Args:
            tubelet: frames per token.
        """
        if self.kept_BM is None or self.grids_B2 is None:
            return None
        steps = self.pixels.shape[2] // tubelet if self.pixels.ndim == 5 else 1
        return KeptTokens.of_mask(self.grids_B2, self.kept_BM, steps)

    def _map(self, function: Callable[[Tensor], Tensor]) -> InputBatch:
        grids_B2 = None if self.grids_B2 is None else function(self.grids_B2)
        kept_BM = None if self.kept_BM is None else function(self.kept_BM)
        return InputBatch(function(self.pixels), grids_B2, kept_BM)

    def pictures(self) -> list[Tensor]:
        """Returns the pixels of each one, uint8 [C, H, W] or [C, T, H, W], strips put together."""
        patch = self.pixels.shape[-2]
        if self.kept_BM is None or self.pixels.shape[-1] != patch * self.kept_BM.shape[1]:
            return list(self.pixels)
        assert self.grids_B2 is not None
        return [
            _unstrip(strip, *grid)
            for strip, grid in zip(self.pixels, self.grids_B2.tolist(), strict=True)
        ]


def _channels_second(pixels: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).movedim(-1, 1)


def _strip(picture: npt.NDArray[np.uint8], patch: int, count: int) -> npt.NDArray[np.uint8]:
    """Puts the patches of [..., H, W, C] side by side, [..., patch, patch * count, C]."""
    *lead, height, width, channels = picture.shape
    cut = picture.reshape(*lead, height // patch, patch, width // patch, patch, channels)
    side_by_side = np.moveaxis(cut, -4, -5).reshape(*lead, patch, -1, channels)
    strip = np.zeros((*lead, patch, patch * count, channels), np.uint8)
    strip[..., : side_by_side.shape[-2], :] = side_by_side
    return strip


def _unstrip(strip: Tensor, rows: int, columns: int) -> Tensor:
    """Puts the patches of [..., patch, patch * count] together, [..., H, W]."""
    patch = strip.shape[-2]
    shape = (*strip.shape[:-2], patch, rows, columns, patch)
    cut = strip[..., : patch * rows * columns].reshape(shape).movedim(-4, -3)
    return cut.reshape(*strip.shape[:-2], rows * patch, columns * patch)


@dataclass(frozen=True)
class Encoded:
    """Tokens of a batch after the final LayerNorm, and what they are tokens of."""

    tokens_BKD: Tensor
    """fp32; K is N if nothing is left out."""
    kept: KeptTokens | None
    """Which tokens these are; None for all of the input, in order."""
    count: int
    """N."""

    def mean(self) -> Tensor:
        """Returns the mean of each one's tokens, [B, D]."""
        return self.tokens_BKD.mean(dim=1) if self.kept is None else self.kept.mean(self.tokens_BKD)

    def in_grid(self) -> Tensor:
        """Returns the tokens at their places, [B, N, D]; NaN where there is none."""
        if self.kept is None:
            return self.tokens_BKD
        there_BN = self.kept.in_grid(torch.ones_like(self.tokens_BKD[..., :1]), self.count) > 0
        return self.kept.in_grid(self.tokens_BKD, self.count).masked_fill(~there_BN, math.nan)

    def on_host(self, rows: Sequence[int]) -> Encoded:
        """Returns some of the images or clips in the host's memory."""

        def copied(values: Tensor) -> Tensor:
            return torch.stack([values[row] for row in rows]).cpu()

        kept = self.kept
        if kept is not None:
            kept = KeptTokens(copied(kept.grids_B2), copied(kept.ids_BK), copied(kept.valid_BK))
        return Encoded(copied(self.tokens_BKD), kept, self.count)

    def each(self) -> list[Tensor]:
        """Returns each one's tokens in ascending order, [K', D] with K' of its own."""
        if self.kept is None:
            return list(self.tokens_BKD)
        pairs = zip(self.tokens_BKD, self.kept.valid_BK, strict=True)
        return [tokens_KD[valid_K] for tokens_KD, valid_K in pairs]


def encode(
    encoder: nn.Module, batch: InputBatch, prep: Preprocessing, *, autocast: bool = False
) -> Encoded:
    """Encodes a batch on the device and in the dtype of the encoder's weights.

    Patches that are left out never reach the encoder.

    Args:
        encoder: a `VisionTransformer`. Batches without `kept_BM` need no more than a function of
            normalised images or clips that returns tokens [B, N, D].
        batch: made under `prep`.
        prep: gives the channel statistics.
        autocast: run the forward in bfloat16.
    """
    weight = next(encoder.parameters())
    # Counted where the batch is, because the device would be waited for.
    tubelet = encoder.tubelet if isinstance(encoder, VisionTransformer) else 1
    kept = batch.kept(tubelet)
    batch = batch.to(weight.device)
    pixels = normalize(batch.pixels, prep.mean, prep.std).to(weight.dtype)
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=autocast):
        if kept is None:
            tokens_BND = encoder(pixels)
            return Encoded(tokens_BND.float(), None, tokens_BND.shape[1])
        assert isinstance(encoder, VisionTransformer)
        patches_BNP, kept = encoder.patch_embed.patchify(pixels), kept.to(weight.device)
        tokens_BKD = kept.encode(encoder, patches_BNP)
        return Encoded(tokens_BKD.float(), kept, patches_BNP.shape[1])
