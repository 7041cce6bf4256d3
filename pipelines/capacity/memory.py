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
GATHERED_BLOCKS = 2
"""Whole blocks that a sharded run holds: the one that runs, and the next."""
CONTEXT_BYTES = 1.5 * 2**30
"""What a process takes of a GPU beside its tensors: CUDA's context, kernels, workspaces of cuBLAS,
buffers of NCCL. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker's device. Sharded over N workers, all but the activations and what is
    gathered is N times smaller."""

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
    """Whole blocks of a sharded run."""
    other: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def worker_memory(
    cost: StepCost, cfg: PretrainConfig, *, shards: int = 1, activation_share: float = 1.0
) -> Memory:
    """Returns the memory of one worker.

    Args:
        cost: what a step of the run needs.
        cfg: the run.
        shards: number of workers among which weights, gradients, optimizer and target are divided;
            1 if each has all of them.
        activation_share: activations that are really kept, as a share of the count.
    """
    local = cfg.data.batch_size / cfg.run.most_workers / cfg.run.accumulate
    on_device = 0.0 if cfg.run.cpu_offload else 1.0
    wide = 1.0 if cfg.run.precision == "fp32" else 0.5  # blocks are gathered in autocast's type
    return Memory(
        weights=on_device * FP32 * cost.trained / shards,
        gradients=on_device * FP32 * cost.trained / shards,
        optimizer=on_device * optimizer_bytes(cost, cfg.optim) / shards,
        target=on_device * FP32 * cost.frozen / shards,
        activations=cost.kept_bytes * local * activation_share,
        casts=cost.cast_bytes if shards == 1 else 0.0,
        gathered=GATHERED_BLOCKS * wide * cost.block_bytes if shards > 1 else 0.0,
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
