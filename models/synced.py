"""Differentiable means over all training processes.

Losses that depend on statistics of the whole batch use them, so that the result does not depend on
the number of processes that share the batch. Every process must hold the same number of rows; the
trainer ensures this.

Shape legend: B rows in this process, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def world_size() -> int:
    """Returns the number of training processes; 1 if `torch.distributed` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _reduced(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # Each of the W losses depends on this mean, and this process contributed 1/W to it. So its
        # gradient is the sum over processes divided by W. DDP then divides by W once more, because
        # it averages gradients, and the result is that of one process with the whole batch.
        return _reduced(grads[0])


def _reduced(values: torch.Tensor) -> torch.Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)  # a sum: gloo has no mean
    return total / dist.get_world_size()


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Returns the mean of `values` over all processes, with the same shape and dtype.

    After DDP has averaged the gradients of all processes, they equal those of a single process that
    holds the whole batch.
    """
    if world_size() == 1:
        return values
    mean: torch.Tensor = _MeanOverProcesses.apply(values)
    return mean


class SyncedBatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy, 2015) over the rows of all processes, on any device.

    `torch.nn.SyncBatchNorm` only supports GPUs. There are no running statistics, because this layer
    is meant for projectors, which are discarded after training.

    Args:
        width: D.
        eps: constant added to the variance.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Normalises rows: [B, D] to [B, D] in the weights' dtype (fp32), also under autocast."""
        with torch.autocast(rows_BD.device.type, enabled=False):
            rows_BD = rows_BD.to(self.weight.dtype)
            centred_BD = rows_BD - mean_over_processes(rows_BD.mean(0))
            variance_D = mean_over_processes(centred_BD.square().mean(0))
            rows_BD = centred_BD * (variance_D + self.eps).rsqrt() * self.weight + self.bias
            return rows_BD
