"""Rotary position embedding with float64 phases: exact after a billion tokens as after ten.

Legend: B rows (sessions of a decode batch or tokens of a chunk), H heads, D head width,
F = D / 2 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.sink_lm.network.config import RopeConfig


def frequencies(cfg: RopeConfig, head_dim: int) -> Tensor:
    """Returns radians per position of every pair of dimensions, stretched as configured.

    Sources: Su et al. 2021 (default), Chen et al. 2023 (linear), Meta's Llama 3.1 (llama3), Peng et
    al. 2023 (YaRN, "NTK-by-parts").

    Returns:
        float64 [F].
    """
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain_F = cfg.theta**-exponents_F
    if cfg.kind == "linear":
        return plain_F / cfg.factor
    if cfg.kind == "llama3":
        return _llama3(plain_F, cfg)
    if cfg.kind == "yarn":
        return _yarn(plain_F, cfg, head_dim)
    return plain_F


def _llama3(plain_F: Tensor, cfg: RopeConfig) -> Tensor:
    turns_F = cfg.original_max_positions * plain_F / (2 * math.pi)
    span = cfg.high_freq_factor - cfg.low_freq_factor
    keep_F = ((turns_F - cfg.low_freq_factor) / span).clamp(0, 1)
    return keep_F * plain_F + (1 - keep_F) * plain_F / cfg.factor


def _yarn(plain_F: Tensor, cfg: RopeConfig, head_dim: int) -> Tensor:
    def dimension(turns: float) -> float:
        """Returns the dimension that makes so many turns over the original context."""
        ratio = cfg.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(cfg.theta))

    low, high = dimension(cfg.beta_fast), dimension(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index_F = torch.arange(len(plain_F), dtype=torch.float64)
    stretch_F = ((index_F - low) / max(high - low, 0.001)).clamp(0, 1)
    return stretch_F * plain_F / cfg.factor + (1 - stretch_F) * plain_F


def attention_scale(cfg: RopeConfig) -> float:
    """Returns the factor on rotated queries and keys: YaRN's temperature, 1 for other kinds."""
    if cfg.kind != "yarn":
        return 1.0
    if cfg.attention_factor is not None:
        return cfg.attention_factor
    return 0.1 * math.log(cfg.factor) + 1.0 if cfg.factor > 1 else 1.0


@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines of B positions, [B, 1, D] each, in the model's dtype."""

    cos_B1D: Tensor
    sin_B1D: Tensor

    def __call__(self, heads_BHD: Tensor) -> Tensor:
        """Rotates the pairs (i, i + F) of every head, Hugging Face's layout."""
        first, second = heads_BHD.chunk(2, dim=-1)
        swapped_BHD = torch.cat((second, first), dim=-1)
        return torch.addcmul(heads_BHD * self.cos_B1D, swapped_BHD, self.sin_B1D)


def rotation(
    positions_B: Tensor, frequencies_F: Tensor, scale: float, dtype: torch.dtype
) -> Rotation:
    """Returns the rotation of integer positions; phases are float64 until the last step.

    float32 phases would be 0.05 radians wrong after a million tokens.
    """
    phases_B1F = positions_B.to(torch.float64)[:, None, None] * frequencies_F
    cos_B1F, sin_B1F = phases_B1F.cos() * scale, phases_B1F.sin() * scale
    return Rotation(
        torch.cat((cos_B1F, cos_B1F), dim=-1).to(dtype),
        torch.cat((-sin_B1F, sin_B1F), dim=-1).to(dtype),
    )
