"""Learning rate and weight decay as pure functions of the step, and how they drive an optimizer.

Step numbers here count from 1, as the original counts: the first optimizer step of a run is step 1
and the last is `total_steps`. Step 0 is the start of the ramp and is never taken. The schedule is
set before the optimizer steps.
"""

from __future__ import annotations

import math

import torch

from models.hyperoptim.optimizer import HyperOptimizer
from pipelines.config.train import OptimConfig


def learning_rate(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Linear from `start_lr` to `lr` over `warmup_steps`, then a half cosine to `final_lr`.

    Schedule-free, which averages instead of annealing, stays at `lr`.

    Args:
        step: Number of the optimizer step, 1 to `total_steps`.
        cfg: Peak, ends and warm-up length.
        total_steps: Steps of the whole run; the cosine ends there.
    """
    if step < cfg.warmup_steps:
        return cfg.start_lr + (cfg.lr - cfg.start_lr) * step / cfg.warmup_steps
    if cfg.name == "schedulefree":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    return _cosine(cfg.lr, cfg.final_lr, progress)


def weight_decay(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Half cosine from `weight_decay` to `final_weight_decay` over the whole run."""
    return _cosine(cfg.weight_decay, cfg.final_weight_decay, step / max(1, total_steps))


def _cosine(start: float, end: float, progress: float) -> float:
    share = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    # Written so that share 1 gives `start` and share 0 gives `end` exactly.
    return start * share + end * (1 - share)


def tunes_at(step: int, cfg: OptimConfig, total_steps: int) -> bool:
    """Whether a hyperoptimizer moves its hyperparameters: after the warm-up, until `tune_until`."""
    return cfg.warmup_steps < step <= cfg.tune_until * total_steps


def set_schedules(
    optimizer: torch.optim.Optimizer, step: int, cfg: OptimConfig, total_steps: int
) -> tuple[float, float]:
    """Puts step `step`'s learning rate and weight decay into the optimizer and returns them.

    What a hyperoptimizer tunes is a factor on these.
    """
    rate = learning_rate(step, cfg, total_steps)
    decay = weight_decay(step, cfg, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
    if isinstance(optimizer, HyperOptimizer):
        optimizer.tuning = tunes_at(step, cfg, total_steps)
    return rate, decay
