"""Learning rate and weight decay as pure functions of the step.

Steps count from 1, as in the original I-JEPA code: the first optimizer step of a run is step 1 and
the last is `total_steps`. Step 0 is the start of the warm-up ramp and is never taken. Schedules are
set before the optimizer takes the step.
"""

from __future__ import annotations

import math

import torch

from models.hyperoptim.optimizer import HyperOptimizer
from pipelines.config.optim import OptimConfig


def learning_rate(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """The learning rate: linear from `start_lr` to `lr`, then a half cosine to `final_lr`.

    The linear part lasts `warmup_steps`. Schedule-Free averages the weights instead of annealing
    the learning rate, so there the rate stays at `lr`.

    Args:
        step: Number of the optimizer step, 1 to `total_steps`.
        cfg: Start, peak and final learning rate, and the length of the warm-up.
        total_steps: Steps of the whole run; the cosine ends there.
    """
    if step < cfg.warmup_steps:
        return cfg.start_lr + (cfg.lr - cfg.start_lr) * step / cfg.warmup_steps
    if cfg.name == "schedulefree":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    return _cosine(cfg.lr, cfg.final_lr, progress)


def weight_decay(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """The weight decay: a half cosine from `weight_decay` to `final_weight_decay` over the run."""
    return _cosine(cfg.weight_decay, cfg.final_weight_decay, step / max(1, total_steps))


def _cosine(start: float, end: float, progress: float) -> float:
    share = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    # Written so that share 1 gives `start` and share 0 gives `end` exactly.
    return start * share + end * (1 - share)


def tunes_at(step: int, cfg: OptimConfig, total_steps: int) -> bool:
    """Whether a hyperoptimizer tunes at this step: after the warm-up and until `tune_until`."""
    return cfg.warmup_steps < step <= cfg.tune_until * total_steps


def set_schedules(
    optimizer: torch.optim.Optimizer, step: int, cfg: OptimConfig, total_steps: int
) -> tuple[float, float]:
    """Sets the learning rate and weight decay of `step` in the optimizer and returns both.

    A hyperoptimizer tunes factors by which these two are multiplied.
    """
    rate = learning_rate(step, cfg, total_steps)
    decay = weight_decay(step, cfg, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
    if isinstance(optimizer, HyperOptimizer):
        optimizer.tuning = tunes_at(step, cfg, total_steps)
    return rate, decay
