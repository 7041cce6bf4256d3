"""Between the pixels of images or clips and the patches that a decoder draws.

Shape legend: B images or clips, C channels, T frames, H and W pixels, S time steps, N tokens of a
picture (an image, or a time step of a clip), M = B * S pictures, P pixel values per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.encoders.vit import VisionTransformer


def to_values(pixels: Tensor) -> Tensor:
    """Maps uint8 to float from -1 to 1."""
    return pixels.float() / 127.5 - 1


def to_bytes(values: Tensor) -> Tensor:
    """Maps what a decoder draws to uint8; values beyond the range are clipped."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def by_picture(per_token: Tensor, encoder: VisionTransformer) -> Tensor:
    """Parts the tokens of clips by time step: [B, S * N, ...] to [B * S, N, ...]."""
    return per_token.reshape(-1, encoder.grid.per_step, *per_token.shape[2:])


def by_sample(per_token: Tensor, encoder: VisionTransformer) -> Tensor:
    """Puts the time steps of clips together: [B * S, N, ...] to [B, S * N, ...]."""
    return per_token.reshape(-1, encoder.num_patches, *per_token.shape[2:])


def unpatchify(patches_BNP: Tensor, encoder: VisionTransformer) -> Tensor:
    """Undoes `PatchEmbed.patchify`: clips [B, C, T, H, W], or images [B, C, H, W] of an encoder of
    images."""
    grid, p, s = encoder.grid, encoder.patch_size, encoder.tubelet
    cut = patches_BNP.reshape(-1, grid.tubes, grid.rows, grid.columns, 3, s, p, p)
    clips_BCTHW = cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(
        len(cut), 3, grid.tubes * s, grid.rows * p, grid.columns * p
    )
    return clips_BCTHW[:, :, 0] if encoder.frames == 1 else clips_BCTHW
