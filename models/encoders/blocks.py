"""Transformer blocks of the encoder and the predictor: timm's, with optional rotary positions.

Shape legend: B sequences, K tokens, D token width, H attention heads, E dimensions per head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from models.encoders.linear import use_linear
from models.encoders.positions import Rotation
from models.encoders.timm_parts import Attention, Block

LN_EPS = 1e-6


class RotaryBlock(Block):
    """A timm block that rotates its queries and keys (RoPE). Weight names are those of timm."""

    def forward(  # type: ignore[override]  # where timm's takes an attention mask
        self, tokens_BKD: torch.Tensor, rotation: Rotation, seen_B11K: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Applies the block: [B, K, D] to [B, K, D], in the dtype of the input."""
        tokens_BKD = tokens_BKD + self._attend(self.norm1(tokens_BKD), rotation, seen_B11K)
        out: torch.Tensor = tokens_BKD + self.mlp(self.norm2(tokens_BKD))
        return out

    def _attend(
        self, tokens_BKD: torch.Tensor, rotation: Rotation, seen_B11K: torch.Tensor | None
    ) -> torch.Tensor:
        B, K, D = tokens_BKD.shape
        attention: Any = self.attn  # mypy sees a Tensor or a Module
        qkv = attention.qkv(tokens_BKD).reshape(B, K, 3, attention.num_heads, -1)
        q_BHKE, k_BHKE, v_BHKE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q_BHKE, k_BHKE = rotation(q_BHKE), rotation(k_BHKE)
        if attention.fused_attn:
            mixed_BHKE = functional.scaled_dot_product_attention(
                q_BHKE, k_BHKE, v_BHKE, attn_mask=seen_B11K
            )
        else:
            scores_BHKK = q_BHKE * attention.scale @ k_BHKE.mT
            if seen_B11K is not None:
                scores_BHKK = scores_BHKK.masked_fill(~seen_B11K, float("-inf"))
            mixed_BHKE = scores_BHKK.softmax(-1) @ v_BHKE
        projected: torch.Tensor = attention.proj(mixed_BHKE.transpose(1, 2).reshape(B, K, D))
        return projected


def transformer_blocks(
    width: int, depth: int, heads: int, mlp_ratio: float, *, rotary: bool = False
) -> nn.ModuleList:
    """Builds timm's pre-norm blocks: fused SDPA attention with qkv bias, exact GELU, no dropout.

    Args:
        width: D, a multiple of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP as a multiple of `width`.
        rotary: builds `RotaryBlock`s, which need a `Rotation` in `run_blocks`.
    """
    norm: Any = partial(nn.LayerNorm, eps=LN_EPS)  # timm's annotation knows only classes
    kind = RotaryBlock if rotary else Block
    make = partial(kind, dim=width, num_heads=heads, mlp_ratio=mlp_ratio, qkv_bias=True)
    blocks = nn.ModuleList([make(norm_layer=norm) for _ in range(depth)])
    use_linear(blocks)
    return blocks


def run_blocks(
    blocks: nn.ModuleList,
    tokens_BKD: torch.Tensor,
    rotation: Rotation | None = None,
    valid_BK: torch.Tensor | None = None,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Runs tokens through the blocks.

    Args:
        blocks: result of `transformer_blocks`.
        tokens_BKD: float [B, K, D].
        rotation: rotation of these tokens; required by rotary blocks, None for all others.
        valid_BK: False for padding, which no token sees, bool [B, K]; None if there is none.
        recompute: keeps only the inputs of the blocks and computes everything else again in the
            backward pass (activation checkpointing). The results do not change.

    Returns:
        Tokens after the last block, [B, K, D].
    """
    recompute = recompute and torch.is_grad_enabled()
    extras: tuple[Any, ...] = () if rotation is None else (rotation,)
    if valid_BK is not None:
        extras = (*extras, valid_BK[:, None, None])
    for block in blocks:
        if recompute:
            tokens_BKD = checkpoint(block, tokens_BKD, *extras, use_reentrant=False)
        else:
            tokens_BKD = block(tokens_BKD, *extras)
    return tokens_BKD


def use_plain_attention(module: nn.Module) -> None:
    """Replaces the fused attention kernel by two matrix products and a softmax, in place.

    The function computed is the same. On CPUs in bfloat16, the backward pass of the fused kernel
    takes ten times as long (a whole step of ViT-S/16 takes 1.93 s instead of 1.45 s, see
    benchmarks/training/step.md), and an encoder with it 5 to 17% longer
    (benchmarks/serving/serving.md). Everywhere else the fused kernel is faster.
    """
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc]  # final for TorchScript only


def init_weights(module: nn.Module, rule: str = "normal") -> None:
    """Initialises a module in place: biases with zero, and every LayerNorm as the identity.

    Args:
        module: the module.
        rule: `normal` draws weights as the released I-JEPA code does, normal with standard
            deviation 0.02, truncated at +-2. That code first divides the residual projections by
            sqrt(2 * layer), but then overwrites them with this rule, so it is the one that takes
            effect. `fan_in` draws them with deviation 1 / sqrt(inputs) (LeCun et al. 1998,
            *Efficient BackProp*, section 4.6). In narrow networks 0.02 is much less than that, and
            the blocks then hardly change the tokens at first.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d):
            std = 0.02 if rule == "normal" else part.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
