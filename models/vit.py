"""The image encoder: a plain vision transformer that computes only the patches it is asked for.

Shape legend: B images, C channels, H and W pixels, N patches of the grid, K kept patches,
P pixel values of one patch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional

from models.positions import sincos_2d

LN_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Shape of an encoder and of the predictor that goes with it."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    predictor_width: int
    predictor_depth: int
    predictor_heads: int


# Encoder shapes: I-JEPA appendix A.1 (s to g), DeiT (ti). Predictors: 384 wide, 12 deep (16 for g)
# as in the paper for l, h and g, 6 deep for b; half the encoder's width for ti and s, where the
# paper's 384 would cost more than the encoder itself. Heads keep the kernels' head size of 32,
# where the original's 24 for h is slow.
PRESETS = {
    "vit_ti": Preset(width=192, depth=12, heads=3, predictor_width=96, predictor_depth=6, predictor_heads=3),
    "vit_s": Preset(width=384, depth=12, heads=6, predictor_width=192, predictor_depth=6, predictor_heads=6),
    "vit_b": Preset(width=768, depth=12, heads=12, predictor_width=384, predictor_depth=6, predictor_heads=12),
    "vit_l": Preset(width=1024, depth=24, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12),
    "vit_h": Preset(width=1280, depth=32, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12),
    "vit_g": Preset(width=1408, depth=40, heads=16, mlp_ratio=48 / 11, predictor_width=384, predictor_depth=16, predictor_heads=12),
    # For 32-pixel images on a few CPU cores.
    "vit_micro32": Preset(width=96, depth=4, heads=3, predictor_width=48, predictor_depth=2, predictor_heads=3),
    "vit_tiny32": Preset(width=128, depth=4, heads=4, predictor_width=64, predictor_depth=2, predictor_heads=2),
    "vit_small32": Preset(width=192, depth=6, heads=6, predictor_width=96, predictor_depth=4, predictor_heads=3),
}  # fmt: skip


class PatchEmbed(nn.Module):
    """Patches to tokens; the convolution's weight, applied as the matrix product it is."""

    def __init__(self, patch_size: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        # Kept as a Conv2d so that names and shapes are timm's.
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def patchify(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to raster-order patches [B, N, P], P ordered as the convolution's weight."""
        B, C, H, W = images_BCHW.shape
        p = self.patch_size
        grid = images_BCHW.reshape(B, C, H // p, p, W // p, p)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // p) * (W // p), C * p * p)

    def forward(self, patches_BKP: torch.Tensor) -> torch.Tensor:
        """[B, K, P] to [B, K, D]."""
        return functional.linear(patches_BKP, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Pre-norm ViT without a class token, fixed sine-cosine positions, final LayerNorm.

    State-dict keys are those of timm's `VisionTransformer`.

    Args:
        image_size: pixels on a side of the square input.
        patch_size: pixels on a side of a patch; divides `image_size`.
        width: token dimensions D.
        depth: transformer blocks.
        heads: attention heads; divides `width`.
        mlp_ratio: hidden width of the MLP over D.
        patch_std: standard deviation of the initial patch embedding.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        patch_std: float = 0.02,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide image size {image_size}")
        self.image_size, self.patch_size = image_size, patch_size
        self.width, self.depth, self.heads, self.mlp_ratio = width, depth, heads, mlp_ratio
        self.patch_std = patch_std
        self.grid = image_size // patch_size
        self.num_patches = self.grid * self.grid
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(sincos_2d(width, self.grid)[None], requires_grad=False)
        self.blocks = transformer_blocks(width, depth, heads, mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        init_weights(self)
        with torch.no_grad():
            self.patch_embed.proj.weight.mul_(patch_std / 0.02)

    def forward(
        self, images_BCHW: torch.Tensor, keep_BK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes normalised float images.

        Args:
            images_BCHW: [B, 3, image_size, image_size].
            keep_BK: int64 raster indices of the patches to compute; None for all of them.

        Returns:
            Tokens after the final LayerNorm, [B, K, D] (or [B, N, D]).
        """
        self._check(images_BCHW)
        return self.forward_patches(self.patch_embed.patchify(images_BCHW), keep_BK)

    def forward_patches(
        self, patches_BNP: torch.Tensor, keep_BK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `forward`, from `patch_embed.patchify`'s output, so that two encoders can share it."""
        positions_BND: torch.Tensor = self.pos_embed
        if keep_BK is not None:
            patches_BNP = gather_tokens(patches_BNP, keep_BK)
            positions_BND = self.pos_embed[0][keep_BK]
        tokens = self.patch_embed(patches_BNP) + positions_BND
        for block in self.blocks:
            tokens = block(tokens)
        normed: torch.Tensor = self.norm(tokens)
        return normed

    def _check(self, images_BCHW: torch.Tensor) -> None:
        expected = (3, self.image_size, self.image_size)
        if tuple(images_BCHW.shape[1:]) != expected:
            raise ValueError(f"expected images [B, {expected}], got {tuple(images_BCHW.shape)}")


def build_encoder(
    preset: str, *, image_size: int, patch_size: int, patch_std: float = 0.02
) -> VisionTransformer:
    """Builds the encoder of a row of `PRESETS`.

    Raises:
        ValueError: no such preset.
    """
    shape = find_preset(preset)
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        mlp_ratio=shape.mlp_ratio,
        patch_std=patch_std,
    )


def find_preset(name: str) -> Preset:
    """Returns a row of `PRESETS`, or a ValueError that lists them."""
    if name not in PRESETS:
        raise ValueError(f"--model.encoder: no preset {name!r}; one of {', '.join(PRESETS)}")
    return PRESETS[name]


def transformer_blocks(width: int, depth: int, heads: int, mlp_ratio: float) -> nn.ModuleList:
    """timm's pre-norm blocks: fused SDPA attention with qkv bias, exact GELU, no dropout."""
    norm: Any = partial(nn.LayerNorm, eps=LN_EPS)  # timm's annotation knows only classes
    make = partial(Block, dim=width, num_heads=heads, mlp_ratio=mlp_ratio, qkv_bias=True)
    return nn.ModuleList([make(norm_layer=norm) for _ in range(depth)])


def use_plain_attention(module: nn.Module) -> None:
    """Makes every attention two matrix products and a softmax instead of the fused kernel.

    The same function. On CPUs the fused kernel's backward pass takes ten times as long in bfloat16
    (a whole step of ViT-S/16: 1.93 s against 1.45 s; benchmarks/step.md); elsewhere it is the faster.
    """
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc]  # final for TorchScript only


def gather_tokens(tokens_BND: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """Picks tokens [B, K, D] by index; the index is expanded, not copied."""
    return torch.gather(tokens_BND, 1, ids_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))


def init_weights(module: nn.Module) -> None:
    """Normal weights of std 0.02 cut at +-2, zero biases, LayerNorm at identity.

    The released I-JEPA code divides the residual projections by sqrt(2 * layer) and then
    overwrites them with this same rule; so the effective rule is this one.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
