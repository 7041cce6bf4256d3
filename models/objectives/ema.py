"""The target encoder's update: an exponential moving average of the context encoder."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def make_target(encoder: M) -> M:
    """Returns a copy of `encoder` that no gradient reaches."""
    return copy.deepcopy(encoder).requires_grad_(False)


@torch.no_grad()
def update_target(target: nn.Module, encoder: nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * encoder, in one multi-tensor pass.

    In the weights' own fp32: 1 - momentum is at most 4e-3, which bf16 cannot resolve.
    """
    torch._foreach_lerp_(list(target.parameters()), list(encoder.parameters()), 1.0 - momentum)
