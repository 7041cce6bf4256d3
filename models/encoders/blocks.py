"""The transformer that encoder and predictor share: timm's blocks, with or without rotation.

Shape legend: B sequences, K tokens, D width, H heads, E dimensions of a head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.encoders.positions import Rotation

LN_EPS = 1e-6


class RotaryBlock(Block):
    """timm's block, under the same weight names, with queries and keys rotated."""

    def forward(  # type: ignore[override]  # where timm's takes an attention mask
        self, tokens_BKD: torch.Tensor, rotation: Rotation
    ) -> torch.Tensor:
        """[B, K, D] to [B, K, D]."""
        tokens_BKD = tokens_BKD + self._attend(self.norm1(tokens_BKD), rotation)
        out: torch.Tensor = tokens_BKD + self.mlp(self.norm2(tokens_BKD))
        return out

    def _attend(self, tokens_BKD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        B, K, D = tokens_BKD.shape
        attention: Any = self.attn  # mypy sees a Tensor or a Module
        qkv = attention.qkv(tokens_BKD).reshape(B, K, 3, attention.num_heads, -1)
        q_BHKE, k_BHKE, v_BHKE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q_BHKE, k_BHKE = rotation(q_BHKE), rotation(k_BHKE)
        if attention.fused_attn:
            mixed_BHKE = functional.scaled_dot_product_attention(q_BHKE, k_BHKE, v_BHKE)
        else:
            mixed_BHKE = (q_BHKE * attention.scale @ k_BHKE.mT).softmax(-1) @ v_BHKE
        projected: torch.Tensor = attention.proj(mixed_BHKE.transpose(1, 2).reshape(B, K, D))
        return projected


def transformer_blocks(
    width: int, depth: int, heads: int, mlp_ratio: float, *, rotary: bool = False
) -> nn.ModuleList:
    """timm's pre-norm blocks: fused SDPA attention with qkv bias, exact GELU, no dropout."""
    norm: Any = partial(nn.LayerNorm, eps=LN_EPS)  # timm's annotation knows only classes
    kind = RotaryBlock if rotary else Block
    make = partial(kind, dim=width, num_heads=heads, mlp_ratio=mlp_ratio, qkv_bias=True)
    return nn.ModuleList([make(norm_layer=norm) for _ in range(depth)])


def run_blocks(
    blocks: nn.ModuleList,
    tokens_BKD: torch.Tensor,
    rotation: Rotation | None = None,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Runs tokens through the blocks.

    Args:
        blocks: of `transformer_blocks`.
        tokens_BKD: [B, K, D].
        rotation: of these tokens, for rotary blocks.
        recompute: keep only the blocks' inputs and compute the rest again in the backward pass
            (activation checkpointing); the numbers are the same.
    """
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        inputs = (tokens_BKD,) if rotation is None else (tokens_BKD, rotation)
        if recompute:
            tokens_BKD = checkpoint(block, *inputs, use_reentrant=False)
        else:
            tokens_BKD = block(*inputs)
    return tokens_BKD


def use_plain_attention(module: nn.Module) -> None:
    """Makes every attention two matrix products and a softmax instead of the fused kernel.

    The same function. On CPUs the fused kernel's backward pass takes ten times as long in bfloat16
    (a whole step of ViT-S/16: 1.93 s against 1.45 s; benchmarks/training/step.md); elsewhere it is
    the faster.
    """
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc]  # final for TorchScript only


def init_weights(module: nn.Module) -> None:
    """Normal weights of std 0.02 cut at +-2, zero biases, LayerNorm at identity.

    The released I-JEPA code divides the residual projections by sqrt(2 * layer) and then
    overwrites them with this same rule; so the effective rule is this one.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
