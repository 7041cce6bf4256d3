"""Means over all training processes that gradients pass through, so that losses of a whole batch do
not depend on how many processes share it.

Every process must hold equally many rows, which the trainer sees to.

Shape legend: B local rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def world_size() -> int:
    """Training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _reduced(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # DDP descends the mean of the processes' losses: each of them depends on this mean, and
        # 1/W of it is this process's. DDP's own division by W then makes the gradient that of one
        # process with the whole batch.
        return _reduced(grads[0])


def _reduced(values: torch.Tensor) -> torch.Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)  # a sum: gloo has no mean
    return total / dist.get_world_size()


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of every process's `values`; its gradient is right once DDP has averaged gradients."""
    if world_size() == 1:
        return values
    mean: torch.Tensor = _MeanOverProcesses.apply(values)
    return mean


class SyncedBatchNorm(nn.Module):
    """Batch normalisation over the rows of all processes (Ioffe and Szegedy, 2015), on any device.

    `torch.nn.SyncBatchNorm` runs on GPUs only. No running statistics: it is for projectors, which
    nothing uses after training.

    Args:
        width: D.
        eps: added to the variance.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """[B, D] to [B, D], in fp32."""
        with torch.autocast(rows_BD.device.type, enabled=False):
            rows_BD = rows_BD.to(self.weight.dtype)
            centred_BD = rows_BD - mean_over_processes(rows_BD.mean(0))
            variance_D = mean_over_processes(centred_BD.square().mean(0))
            rows_BD = centred_BD * (variance_D + self.eps).rsqrt() * self.weight + self.bias
            return rows_BD
