"""The encoder of images and clips: a plain ViT that computes only the tokens it is asked for.

A token is a patch of an image or a tubelet of a clip, that is, one patch of a few frames.

Shape legend: B images or clips, C channels, T frames, H and W pixels, N tokens of the grid (time
first, then row, then column), K kept tokens, P pixel values of one token, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from models.encoders.blocks import LN_EPS, init_weights, run_blocks, transformer_blocks
from models.encoders.positions import make_positions


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
    # For clips. V-JEPA 2's shapes (arXiv 2506.09985, section 2): its giant has 22 heads, and every
    # predictor is 12 deep.
    "video_b": Preset(width=768, depth=12, heads=12, predictor_width=384, predictor_depth=12, predictor_heads=12),
    "video_l": Preset(width=1024, depth=24, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12),
    "video_h": Preset(width=1280, depth=32, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12),
    "video_g": Preset(width=1408, depth=40, heads=22, mlp_ratio=48 / 11, predictor_width=384, predictor_depth=12, predictor_heads=12),
    # For clips of 32 or 64 pixels on a few CPU cores; heads of 24 or 32 suit the three axes of RoPE.
    "video_micro": Preset(width=96, depth=4, heads=3, predictor_width=48, predictor_depth=2, predictor_heads=2),
    "video_tiny": Preset(width=128, depth=4, heads=4, predictor_width=64, predictor_depth=2, predictor_heads=2),
    "video_small": Preset(width=192, depth=6, heads=6, predictor_width=96, predictor_depth=4, predictor_heads=4),
}  # fmt: skip


class PatchEmbed(nn.Module):
    """Patches or tubelets to tokens; the convolution's weight, applied as the matrix product it is.

    Args:
        patch_size: pixels on a side of a patch.
        width: D.
        channels: C.
        tubelet: frames in a token.
    """

    def __init__(self, patch_size: int, width: int, channels: int = 3, tubelet: int = 1) -> None:
        super().__init__()
        self.patch_size, self.tubelet = patch_size, tubelet
        # Kept as a convolution so that names and shapes are timm's, and V-JEPA 2's for tubelets.
        self.proj: nn.Conv2d | nn.Conv3d
        if tubelet == 1:
            self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        else:
            size = (tubelet, patch_size, patch_size)
            self.proj = nn.Conv3d(channels, width, kernel_size=size, stride=size)

    def patchify(self, clips_BCTHW: torch.Tensor) -> torch.Tensor:
        """Clips or images to patches [B, N, P], P ordered as the convolution's weight.

        Args:
            clips_BCTHW: [B, C, T, H, W]; or images [B, C, H, W], which are clips of one token in
                time, the image repeated to fill it (as `transformers.VJEPA2Model` does).
        """
        if clips_BCTHW.ndim == 4:
            clips_BCTHW = clips_BCTHW[:, :, None].expand(-1, -1, self.tubelet, -1, -1)
        B, C, T, H, W = clips_BCTHW.shape
        s, p = self.tubelet, self.patch_size
        grid = clips_BCTHW.reshape(B, C, T // s, s, H // p, p, W // p, p)
        tokens_first = grid.permute(0, 2, 4, 6, 1, 3, 5, 7)
        return tokens_first.reshape(B, (T // s) * (H // p) * (W // p), C * s * p * p)

    def forward(self, patches_BKP: torch.Tensor) -> torch.Tensor:
        """[B, K, P] to [B, K, D]."""
        return functional.linear(patches_BKP, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Pre-norm ViT without a class token, fixed positions, final LayerNorm.

    State-dict keys are those of timm's `VisionTransformer`; rotary positions have none.

    Args:
        image_size: pixels on a side of the square input.
        patch_size: pixels on a side of a patch; divides `image_size`.
        width: token dimensions D.
        depth: transformer blocks.
        heads: attention heads; divides `width`.
        mlp_ratio: hidden width of the MLP over D.
        patch_std: standard deviation of the initial patch embedding.
        frames: frames of the longest clip; 1 for images.
        tubelet: frames in a token; divides `frames`.
        positions: row of `models.encoders.positions.POSITIONS`.
        activation_checkpointing: compute activations twice rather than keep them.
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
        frames: int = 1,
        tubelet: int = 1,
        positions: str = "sincos",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide image size {image_size}")
        if frames % tubelet:
            raise ValueError(f"--model.tubelet: {tubelet} frames do not divide a clip of {frames}")
        self.image_size, self.patch_size = image_size, patch_size
        self.frames, self.tubelet, self.positions = frames, tubelet, positions
        self.width, self.depth, self.heads, self.mlp_ratio = width, depth, heads, mlp_ratio
        self.patch_std, self.activation_checkpointing = patch_std, activation_checkpointing
        self.grid, self.tubes = image_size // patch_size, frames // tubelet
        self.num_patches = self.tubes * self.grid * self.grid
        self.patch_embed = PatchEmbed(patch_size, width, tubelet=tubelet)
        self.pos_embed, self.rope = make_positions(
            positions, width=width, heads=heads, side=self.grid, tubes=self.tubes
        )
        rotary = self.rope is not None
        self.blocks = transformer_blocks(width, depth, heads, mlp_ratio, rotary=rotary)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        init_weights(self)
        with torch.no_grad():
            self.patch_embed.proj.weight.mul_(patch_std / 0.02)

    def forward(
        self, clips_BCTHW: torch.Tensor, keep_BK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes normalised float clips or images.

        Args:
            clips_BCTHW: [B, 3, T, image_size, image_size] with T a multiple of `tubelet` up to
                `frames`; or images [B, 3, image_size, image_size], clips of one token in time.
            keep_BK: int64 numbers of the tokens to compute; None for all of them.

        Returns:
            Tokens after the final LayerNorm, [B, K, D] (or [B, N, D]).

        Raises:
            ValueError: another shape.
        """
        self._check(clips_BCTHW)
        return self.forward_patches(self.patch_embed.patchify(clips_BCTHW), keep_BK)

    def forward_patches(
        self, patches_BNP: torch.Tensor, keep_BK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `forward`, from `patch_embed.patchify`'s output, so that two encoders can share it."""
        if keep_BK is None:
            ids_BK = torch.arange(patches_BNP.shape[1], device=patches_BNP.device)[None]
        else:
            ids_BK, patches_BNP = keep_BK, gather_tokens(patches_BNP, keep_BK)
        return self.forward_tokens(patches_BNP, ids_BK)

    def forward_tokens(self, patches_BKP: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
        """Encodes patches [B, K, P] that lie at `ids_BK` (int64 [B, K] or [1, K]) of the grid."""
        tokens = self.patch_embed(patches_BKP)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed[0][ids_BK]
        rotation = None if self.rope is None else self.rope(ids_BK)
        # The residual stream has the weights' dtype; autocast would leave it in bf16 under RoPE.
        tokens = tokens.to(self.norm.weight.dtype)
        tokens = run_blocks(self.blocks, tokens, rotation, recompute=self.activation_checkpointing)
        normed: torch.Tensor = self.norm(tokens)
        return normed

    def _check(self, clips_BCTHW: torch.Tensor) -> None:
        shape, picture = tuple(clips_BCTHW.shape), (3, self.image_size, self.image_size)
        if len(shape) != 5:
            if shape[1:] != picture:
                raise ValueError(f"expected images [B, {picture}], got {shape}")
            return
        length = shape[2]
        fits = 0 < length <= self.frames and length % self.tubelet == 0
        if (shape[1], *shape[3:]) != picture or not fits:
            raise ValueError(
                f"expected clips [B, 3, T, {self.image_size}, {self.image_size}] with T a multiple "
                f"of {self.tubelet} up to {self.frames}, got {shape}"
            )


def build_encoder(
    preset: str,
    *,
    image_size: int,
    patch_size: int,
    patch_std: float = 0.02,
    frames: int = 1,
    tubelet: int = 1,
    positions: str = "sincos",
    activation_checkpointing: bool = False,
) -> VisionTransformer:
    """Builds the encoder of a row of `PRESETS`; the other arguments are `VisionTransformer`'s.

    Raises:
        ValueError: no such preset, or sizes that do not fit.
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
        frames=frames,
        tubelet=tubelet,
        positions=positions,
        activation_checkpointing=activation_checkpointing,
    )


def find_preset(name: str) -> Preset:
    """Returns a row of `PRESETS`, or a ValueError that lists them."""
    if name not in PRESETS:
        raise ValueError(f"--model.encoder: no preset {name!r}; one of {', '.join(PRESETS)}")
    return PRESETS[name]


def gather_tokens(tokens_BND: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """Picks tokens [B, K, D] by index; the index is expanded, not copied."""
    return torch.gather(tokens_BND, 1, ids_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))
