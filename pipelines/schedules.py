"""Learning rate and weight decay as pure functions of the step, and the optimizer they drive.

Step numbers here count from 1, as the original counts: the first optimizer step of a run is step 1
and the last is `total_steps`. Step 0 is the start of the ramp and is never taken. The schedule is
set before the optimizer steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pipelines.config import OptimConfig


def learning_rate(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Linear from `start_lr` to `lr` over `warmup_steps`, then a half cosine to `final_lr`.

    Args:
        step: Number of the optimizer step, 1 to `total_steps`.
        cfg: Peak, ends and warm-up length.
        total_steps: Steps of the whole run; the cosine ends there.
    """
    if step < cfg.warmup_steps:
        return cfg.start_lr + (cfg.lr - cfg.start_lr) * step / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    return _cosine(cfg.lr, cfg.final_lr, progress)


def weight_decay(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Half cosine from `weight_decay` to `final_weight_decay` over the whole run."""
    return _cosine(cfg.weight_decay, cfg.final_weight_decay, step / max(1, total_steps))


def _cosine(start: float, end: float, progress: float) -> float:
    share = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    # Written so that share 1 gives `start` and share 0 gives `end` exactly.
    return start * share + end * (1 - share)


def takes_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter decays: not biases, not anything one-dimensional (facts: mask tokens do)."""
    return not (name.endswith("bias") or parameter.ndim == 1)


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters in two groups, decaying and not.

    Fused on CUDA, foreach elsewhere. Learning rate and decay are placeholders until
    `set_schedules`; the groups keep the parameters in the module's order, which is what makes
    checkpoints of the optimizer independent of anything but the names.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = [p for n, p in named if takes_weight_decay(n, p)]
    no_decay = [p for n, p in named if not takes_weight_decay(n, p)]
    groups: list[dict[str, Any]] = [
        {"params": decay, "decays": True},
        {"params": no_decay, "decays": False, "weight_decay": 0.0},
    ]
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        fused=on_cuda,
        foreach=not on_cuda,
    )


def set_schedules(
    optimizer: torch.optim.Optimizer, step: int, cfg: OptimConfig, total_steps: int
) -> tuple[float, float]:
    """Puts step `step`'s learning rate and weight decay into the optimizer and returns them."""
    rate = learning_rate(step, cfg, total_steps)
    decay = weight_decay(step, cfg, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate, decay
