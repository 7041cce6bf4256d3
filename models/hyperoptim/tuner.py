"""A stack of optimizers above the optimizer: each moves the hyperparameters of the one below.

A level moves only a few numbers, so its cost is too small to measure. Its rules and formulas are
those for the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from models.hyperoptim.adam import Adam
from models.hyperoptim.hyperparameters import Hyperparameters
from models.hyperoptim.rmsprop import RMSprop
from models.hyperoptim.rules import Rule, Values
from models.hyperoptim.sgd import SGD
from models.hyperoptim.tensor_lists import Lists, at_least_1, number

RULES: Mapping[str, Rule] = {
    "sgd": SGD(),
    "rmsprop": RMSprop(),
    "adam": Adam(decoupled=False),
    "adamw": Adam(decoupled=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuner:
    """Settings of one level of the stack: how it moves the hyperparameters of the level below."""

    tune: tuple[str, ...] = ("lr",)
    """Names of the hyperparameters that it moves."""
    bounds: tuple[float, float] = (0.1, 10.0)
    """Smallest and largest factor on each of them, or on the odds of one in (0, 1). Factors start
    at 1, or at the nearer bound if 1 is outside."""
    shared: bool = False
    """Use one factor for all groups of parameters instead of one for each."""
    rule: Literal["sgd", "rmsprop", "adam", "adamw"] = "adam"
    """Its update rule. `sgd` uses hypergradients unscaled, and their scale depends on the model."""
    lr: float = 0.01
    """With adam, about the largest change of a factor's logarithm in a step: 0.01 is 1%."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the moments of adam and adamw."""
    alpha: float = 0.99
    """Decay rate of the squared average of rmsprop."""
    eps: float = 1e-12
    """Added to the denominator by rmsprop, adam and adamw."""
    weight_decay: float = 0.0
    """Pulls the factors back to 1."""
    above: Tuner | None = None
    """The next level, which moves the hyperparameters of this one; None ends the stack."""

    @property
    def base(self) -> dict[str, float]:
        """Its hyperparameters under the names of its rule."""
        beta1, beta2 = self.betas
        every = {**dataclasses.asdict(self), "beta1": beta1, "beta2": beta2}
        return {name: float(every[name]) for name in RULES[self.rule].names}


DEFAULT = Tuner()
"""Tunes the learning rate alone, by Adam."""


def hyperparameters(
    names: Sequence[str],
    bases: Sequence[Values],
    tuner: Tuner | None,
    *,
    on_host: bool,
    device: torch.device,
) -> Hyperparameters:
    """Makes the hyperparameters that `tuner` moves; None moves none."""
    return Hyperparameters(
        names,
        tuner.tune if tuner else (),
        bases,
        tuner.bounds if tuner else (1.0, 1.0),
        shared=tuner is not None and tuner.shared,
        on_host=on_host,
        device=device,
    )


class Level:
    """The running state of a `Tuner` that moves the thetas of `below`."""

    def __init__(self, tuner: Tuner, below: Hyperparameters) -> None:
        self.below, self.base, self.rule = below, tuner.base, RULES[tuner.rule]
        theta = below.theta_RH
        self.own = hyperparameters(
            self.rule.names,
            [self.base],
            tuner.above,
            on_host=below.on_host,
            device=theta.device,
        )
        names = self.rule.buffers(self.base, self.own.tuned)
        self.buffers = {name: torch.zeros_like(theta) for name in names}
        self.steps = torch.zeros((), dtype=torch.float32, device=theta.device)
        self.above = Level(tuner.above, self.own) if tuner.above else None

    def step(self, by_theta_RH: Tensor, gate: Tensor | None) -> None:
        """Moves the thetas below, after the levels above have moved this level.

        Args:
            by_theta_RH: derivative of the loss by these thetas, finite.
            gate: 0-dim bool tensor: whether to move; None, on the host, moves.
        """
        if self.above is not None:
            self._step_above(self.above, by_theta_RH, gate)
        values = self.own.values([self.base])
        self.steps += 1 if gate is None else gate
        step = at_least_1(number(self.steps, self.own.on_host))
        self.rule.update(self._lists(by_theta_RH), values[0], step, gate)
        self.below.clamp(gate)
        self.own.remember(values, gate)

    def _step_above(self, above: Level, by_theta_RH: Tensor, gate: Tensor | None) -> None:
        taken, tuned = number(self.steps, self.own.on_host), self.own.tuned
        # A move that a bound cut short did not depend on the hyperparameters of this level.
        lists = self._lists(by_theta_RH * self.below.inside_RH)
        found = self.rule.hypergradients(lists, self.own.used()[0], at_least_1(taken), tuned)
        by_own = self.own.by_theta(torch.stack([found[name] for name in tuned]).unsqueeze(0))
        if isinstance(taken, Tensor):
            assert gate is not None
            above.step(torch.where(taken > 0, by_own, 0.0), gate & (taken > 0))
        elif taken:
            above.step(by_own, None)

    def _lists(self, by_theta_RH: Tensor) -> Lists:
        buffers = {name: [buffer] for name, buffer in self.buffers.items()}
        return Lists([self.below.theta_RH], [by_theta_RH], buffers)

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint stores of this level and those above."""
        mine = {"steps": self.steps, **self.buffers, **self.own.tensors()}
        above = self.above.tensors() if self.above else {}
        return mine | {f"above.{name}": tensor for name, tensor in above.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `tensors` has returned."""
        for name in ("steps", *self.buffers):
            (self.steps if name == "steps" else self.buffers[name]).copy_(tensors[name])
        self.own.load(tensors)
        if self.above is not None:
            self.above.load(under("above.", tensors))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, under names without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
