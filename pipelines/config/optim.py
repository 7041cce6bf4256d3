"""The optimizer of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config.checks import require

WHOLE_MATRICES = ("muon", "prodigy")
"""Optimizers that cannot work on a part of the rows of every weight."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedules, all pure functions of the step."""

    name: Literal["adamw", "hyper-adamw", "schedulefree", "muon", "prodigy"] = "adamw"
    """`hyper-adamw` is AdamW that tunes factors on its own hyperparameters (docs/optimizers.md);
    `muon` is Muon for matrices and AdamW for the rest; `schedulefree` and `prodigy` come from their
    own packages (extra `optimizers`)."""
    tune: tuple[Literal["lr", "beta1", "beta2", "eps", "weight_decay"], ...] = ("lr",)
    """hyper-adamw: the hyperparameters it tunes. Tuning more than lr has not paid off so far."""
    hyper_lr: float = 0.01
    """hyper-adamw: approximate upper limit of a hyperparameter's relative change in one step."""
    tune_bounds: tuple[float, float] = (0.1, 10.0)
    """hyper-adamw: smallest and largest factor on a hyperparameter (a beta: on its odds)."""
    tune_until: float = 0.75
    """hyper-adamw: fraction of the run after which the factors are frozen, so that they do not undo
    the annealing. During warm-up they are 1."""
    lr: float = 1e-3
    """Peak learning rate. prodigy estimates the rate itself and multiplies it by this; give it
    1."""
    start_lr: float = 2e-4
    """Learning rate at step 0, raised linearly to `lr` over `warmup_steps`."""
    final_lr: float = 1e-6
    """Learning rate at the last step (cosine from the peak); schedulefree stays at the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.04
    """Weight decay at step 0."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step (cosine between)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decay rates."""
    eps: float = 1e-8
    """Adam's denominator floor."""
    clip_norm: float | None = None
    """Largest norm of the gradient of encoder and predictor together; larger gradients are scaled
    down. None, as in I-JEPA, does not clip."""

    def __post_init__(self) -> None:
        require(
            self.lr >= 0 and self.start_lr >= 0 and self.final_lr >= 0, "optim.lr", "must be >= 0"
        )
        require(self.warmup_steps >= 0, "optim.warmup-steps", "must be >= 0")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", "must lie in [0, 1)")
        hyper = self.name == "hyper-adamw"
        require(self.eps > 0 if hyper else self.eps >= 0, "optim.eps", "must be positive")
        stuck = [b for b, beta in zip(("beta1", "beta2"), self.betas, strict=True) if not beta]
        stuck = [b for b in stuck if hyper and b in self.tune]
        require(not stuck, "optim.tune", f"{stuck} are 0, and no factor leads away from there")
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip-norm", "must be positive")
        require(self.hyper_lr >= 0, "optim.hyper-lr", "must be >= 0")
        low, high = self.tune_bounds
        require(0 < low <= 1 <= high, "optim.tune-bounds", "0 < low <= 1 <= high")
        require(0 <= self.tune_until <= 1, "optim.tune-until", "must lie in [0, 1]")
