"""Memory of one training process, and the size of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipelines.capacity.step_cost import StepCost
from pipelines.config.optim import OptimConfig
from pipelines.config.train import PretrainConfig
from pipelines.training.optimizers import build_optimizer

FP32 = 4
CONTEXT_BYTES = 1.5 * 2**30
"""What a process takes of a GPU beside its tensors: CUDA's context, kernels, workspaces of cuBLAS,
buffers of NCCL. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker. Sharded over N workers, a part of all but the activations is N times
    smaller."""

    weights: float
    """Trained parameters, fp32."""
    gradients: float
    optimizer: float
    target: float
    """Parameters without a gradient: the target encoder, fp32."""
    activations: float
    """What the forward pass keeps of one micro-batch."""
    casts: float
    """Weights in the type of autocast, which are kept from the forward to the backward pass."""
    gathered: float
    """Whole blocks that a sharded run gathers: the one that runs, and the next."""
    other: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def worker_memory(
    cost: StepCost, cfg: PretrainConfig, *, shard_over: int = 1, activation_share: float = 1.0
) -> Memory:
    """Returns the memory of one worker.

    Args:
        cost: what a step of the run needs.
        cfg: the run.
        shard_over: number of workers over which weights, gradients, optimizer and target are
            divided; 1 as in data parallel training.
        activation_share: activations that are really kept, as a share of the count.
    """
    local = cfg.data.batch_size / cfg.run.workers / cfg.run.accumulate
    return Memory(
        weights=FP32 * cost.trained / shard_over,
        gradients=FP32 * cost.trained / shard_over,
        optimizer=optimizer_bytes(cost, cfg.optim) / shard_over,
        target=FP32 * cost.frozen / shard_over,
        activations=cost.kept_bytes * local * activation_share,
        casts=cost.cast_bytes if shard_over == 1 else cost.cast_bytes / shard_over,
        gathered=2 * cost.block_bytes if shard_over > 1 else 0.0,
        other=CONTEXT_BYTES if cfg.run.gpu else 0.0,
    )


def optimizer_bytes(cost: StepCost, cfg: OptimConfig) -> float:
    """Returns the bytes of the optimizer's state, whole."""
    matrix, vector = _state_of(cfg)
    return matrix * cost.matrices + vector * (cost.trained - cost.matrices)


def checkpoint_bytes(cost: StepCost, cfg: PretrainConfig) -> float:
    """Returns the size of a checkpoint: weights, target and optimizer."""
    return FP32 * (cost.trained + cost.frozen) + optimizer_bytes(cost, cfg.optim)


def _state_of(cfg: OptimConfig) -> tuple[float, float]:
    """Returns the bytes of state for a number of a matrix and of a vector, by taking a step.

    Raises:
        ValueError: the optimizer's package is not installed.
    """
    model = nn.Linear(16, 16)
    optimizer = build_optimizer(model, cfg)
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    found = []
    for parameter in (model.weight, model.bias):
        state = optimizer.state[parameter].values()
        tensors = [t for t in state if isinstance(t, torch.Tensor) and t.shape == parameter.shape]
        found.append(sum(t.numel() * t.element_size() for t in tensors) / parameter.numel())
    return found[0], found[1]
