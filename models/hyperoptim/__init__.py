"""Optimizers whose hyperparameters are themselves descended, in closed form; see docs/optimizers.md."""

from models.hyperoptim.optimizer import (
    HyperAdam,
    HyperAdamW,
    HyperOptimizer,
    HyperRMSprop,
    HyperSGD,
    sum_over,
)
from models.hyperoptim.tuner import Tuner

__all__ = [
    "HyperAdam",
    "HyperAdamW",
    "HyperOptimizer",
    "HyperRMSprop",
    "HyperSGD",
    "Tuner",
    "sum_over",
]
