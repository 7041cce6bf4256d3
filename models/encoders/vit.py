"""The encoder of images and clips: a plain ViT that can compute a subset of the tokens.

A token is a patch of an image or a tubelet of a clip. A tubelet is the same patch in a few
successive frames.

Shape legend: B images or clips, C channels, T frames, H and W pixels, N tokens in the grid (ordered
by time, then row, then column), K tokens that are computed, P pixel values per token, D token
width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.encoders.blocks import LN_EPS, init_weights, run_blocks, transformer_blocks
from models.encoders.linear import linear
from models.encoders.positions import embed_places, make_positions
from models.encoders.shape import EncoderShape
from models.image_size import height_width


class PatchEmbed(nn.Module):
    """Embeds patches or tubelets as tokens.

    The weight is stored as that of a convolution whose stride equals its kernel size, and applied
    as a matrix product, which is the same function.

    Args:
        patch_size: pixels per side of a patch.
        width: D.
        channels: C.
        tubelet: frames per token.
    """

    def __init__(self, patch_size: int, width: int, channels: int = 3, tubelet: int = 1) -> None:
        super().__init__()
        self.patch_size, self.tubelet = patch_size, tubelet
        # A convolution, so that weight names and shapes are timm's, or V-JEPA 2's for tubelets.
        self.proj: nn.Conv2d | nn.Conv3d
        if tubelet == 1:
            self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        else:
            size = (tubelet, patch_size, patch_size)
            self.proj = nn.Conv3d(channels, width, kernel_size=size, stride=size)

    def patchify(self, clips_BCTHW: torch.Tensor) -> torch.Tensor:
        """Cuts clips or images into patches.

        Args:
            clips_BCTHW: clips [B, C, T, H, W] or images [B, C, H, W]. An image is repeated
                `tubelet` times and so makes one time step, as in `transformers.VJEPA2Model`.

        Returns:
            [B, N, P] in the dtype of the input, with the P values in the order of the weight.
        """
        if clips_BCTHW.ndim == 4:
            clips_BCTHW = clips_BCTHW[:, :, None].expand(-1, -1, self.tubelet, -1, -1)
        B, C, T, H, W = clips_BCTHW.shape
        s, p = self.tubelet, self.patch_size
        grid = clips_BCTHW.reshape(B, C, T // s, s, H // p, p, W // p, p)
        tokens_first = grid.permute(0, 2, 4, 6, 1, 3, 5, 7)
        return tokens_first.reshape(B, (T // s) * (H // p) * (W // p), C * s * p * p)

    def forward(self, patches_BKP: torch.Tensor) -> torch.Tensor:
        """Embeds patches: [B, K, P] to [B, K, D]."""
        return linear(patches_BKP, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """A pre-norm ViT (Dosovitskiy et al., 2021) with fixed positions and no class token.

    State-dict keys are those of timm's `VisionTransformer`. Rotary positions add no keys.

    Args:
        shape: sizes of the input and of the network.
        activation_checkpointing: recomputes activations in the backward pass to save memory.

    Raises:
        ValueError: the width or head size does not suit the positions.
    """

    def __init__(self, shape: EncoderShape, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.shape, self.activation_checkpointing = shape, activation_checkpointing
        self.image_size, self.patch_size = shape.image_size, shape.patch_size
        self.frames, self.tubelet, self.positions = shape.frames, shape.tubelet, shape.positions
        self.width, self.depth, self.heads = shape.width, shape.depth, shape.heads
        self.mlp_ratio, self.patch_std = shape.mlp_ratio, shape.patch_std
        self.grid, self.num_patches = shape.grid, shape.grid.tokens
        self.patch_embed = PatchEmbed(shape.patch_size, shape.width, tubelet=shape.tubelet)
        self.pos_embed, self.rope = make_positions(
            shape.positions,
            width=shape.width,
            heads=shape.heads,
            grid=shape.grid,
        )
        self.blocks = transformer_blocks(
            shape.width, shape.depth, shape.heads, shape.mlp_ratio, rotary=self.rope is not None
        )
        self.norm = nn.LayerNorm(shape.width, eps=LN_EPS)
        init_weights(self, shape.init)
        if shape.init == "normal":
            with torch.no_grad():
                self.patch_embed.proj.weight.mul_(shape.patch_std / 0.02)

    def forward(
        self, clips_BCTHW: torch.Tensor, keep_BK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes normalised float clips or images.

        Args:
            clips_BCTHW: clips [B, 3, T, H, W], where T is a multiple of `tubelet` and at most
                `frames`; or images [B, 3, H, W]. H and W are those of `image_size`.
            keep_BK: numbers of the tokens to compute, int64 [B, K]; None computes all.

        Returns:
            Tokens after the final LayerNorm, [B, K, D], or [B, N, D] if all are computed.

        Raises:
            ValueError: the input has another shape.
        """
        self._check(clips_BCTHW)
        return self.forward_patches(self.patch_embed.patchify(clips_BCTHW), keep_BK)

    def forward_patches(
        self,
        patches_BNP: torch.Tensor,
        keep_BK: torch.Tensor | None = None,
        grids_B2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Like `forward`, but takes the output [B, N, P] of `patch_embed.patchify`.

        Two encoders can thus share the same patches. For `grids_B2` see `forward_tokens`.
        """
        if keep_BK is None:
            ids_BK = torch.arange(patches_BNP.shape[1], device=patches_BNP.device)[None]
        else:
            ids_BK, patches_BNP = keep_BK, gather_tokens(patches_BNP, keep_BK)
        return self.forward_tokens(patches_BNP, ids_BK, grids_B2)

    def forward_tokens(
        self,
        patches_BKP: torch.Tensor,
        ids_BK: torch.Tensor,
        grids_B2: torch.Tensor | None = None,
        valid_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encodes patches at given positions of the grid.

        Args:
            patches_BKP: float [B, K, P].
            ids_BK: token numbers of the patches, int64 [B, K] or [1, K].
            grids_B2: rows and columns of each one's own grid, int64 [B, 2], in which its tokens are
                numbered; positions are interpolated. None for the encoder's own grid.
            valid_BK: False for padding, to which no token attends, bool [B, K]; None if there is
                none.

        Returns:
            Tokens after the final LayerNorm, [B, K, D]; those of padding mean nothing.
        """
        tokens = self.patch_embed(patches_BKP)
        if self.pos_embed is not None:
            tokens = tokens + embed_places(self.pos_embed[0], self.grid, ids_BK, grids_B2)
        rotation = None if self.rope is None else self.rope(ids_BK, grids_B2)
        # The residual stream keeps the weights' dtype. With RoPE, autocast would make it bf16.
        tokens = tokens.to(self.norm.weight.dtype)
        tokens = run_blocks(
            self.blocks, tokens, rotation, valid_BK, recompute=self.activation_checkpointing
        )
        normed: torch.Tensor = self.norm(tokens)
        return normed

    def _check(self, clips_BCTHW: torch.Tensor) -> None:
        height, width = height_width(self.image_size)
        shape, picture = tuple(clips_BCTHW.shape), (3, height, width)
        if len(shape) != 5:
            if shape[1:] != picture:
                raise ValueError(f"expected images [B, {picture}], got {shape}")
            return
        length = shape[2]
        fits = 0 < length <= self.frames and length % self.tubelet == 0
        if (shape[1], *shape[3:]) != picture or not fits:
            raise ValueError(
                f"expected clips [B, 3, T, {height}, {width}] with T a multiple of {self.tubelet} "
                f"up to {self.frames}, got {shape}"
            )


def build_encoder(
    preset: str, *, activation_checkpointing: bool = False, **sizes: Any
) -> VisionTransformer:
    """Builds the encoder of a preset with fresh weights.

    Args:
        preset: name in `models.encoders.shape.PRESETS`.
        activation_checkpointing: see `VisionTransformer`.
        sizes: the other fields of `EncoderShape`; `image_size` and `patch_size` are required.

    Raises:
        ValueError: the preset does not exist, or the sizes are incompatible.
        TypeError: `EncoderShape` has no such field.
    """
    shape = EncoderShape.from_preset(preset, **sizes)
    return VisionTransformer(shape, activation_checkpointing=activation_checkpointing)


def gather_tokens(tokens_BND: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """Selects tokens by number: [B, N, D] and int64 [B, K] to [B, K, D].

    The index is expanded over D without being copied.
    """
    return torch.gather(tokens_BND, 1, ids_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))
