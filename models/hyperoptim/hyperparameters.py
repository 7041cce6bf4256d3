"""Hyperparameters that can be descended: their parametrisation, bounds and state.

The base is what the user gives; a schedule may change it at every step. A tuned hyperparameter is
the base times exp(theta). For one in (0, 1), a beta or a momentum, the odds are multiplied instead.
So theta starts at 0, a schedule keeps its shape, nothing becomes negative or reaches 1, and bounds
on the factor exp(theta) mean the same for all.

Shape suffixes: G groups of parameters, H tuned hyperparameters, A all hyperparameters; R rows of
theta, G, or 1 where the groups share one factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.hyperoptim.rules import Values
from models.hyperoptim.tensor_lists import Value

ODDS = {"beta1", "beta2", "momentum", "alpha"}
"""Hyperparameters in (0, 1)."""


def moved(name: str, base: float, theta: Tensor) -> Tensor:
    """Returns the hyperparameter for a base and theta, 0-dim float64; theta 0 gives the base."""
    if name not in ODDS:
        return base * theta.exp()
    odds = base * theta.exp()
    return odds / (1 - base + odds)


def slope(name: str, value: Tensor) -> Tensor:
    """Returns the derivative of `moved` by theta, at the theta for which it is `value`."""
    return value * (1 - value) if name in ODDS else value


class Hyperparameters:
    """The hyperparameters of one optimizer with G groups.

    Args:
        names: names of all A hyperparameters.
        tuned: names of the H that theta moves.
        bases: the A given values of every group.
        bounds: smallest and largest factor exp(theta).
        shared: use one theta for all groups instead of one for each.
        on_host: give values as floats; otherwise as tensors, so that nothing waits for the device.
        device: where theta is.

    Raises:
        ValueError: the rule has no such hyperparameter, or it cannot move away from its base.
    """

    def __init__(
        self,
        names: Sequence[str],
        tuned: Sequence[str],
        bases: Sequence[Values],
        bounds: tuple[float, float],
        *,
        shared: bool,
        on_host: bool,
        device: torch.device,
    ) -> None:
        _check(names, tuned, bases, bounds)
        self.names, self.tuned, self.shared, self.on_host = names, tuned, shared, on_host
        self.bounds = math.log(bounds[0]), math.log(bounds[1])
        rows = 1 if shared else len(bases)
        start = min(max(0.0, self.bounds[0]), self.bounds[1])
        self.theta_RH = torch.full((rows, len(tuned)), start, dtype=torch.float64, device=device)
        self.inside_RH = torch.ones_like(self.theta_RH)
        """0 where a bound cut the last move short, else 1."""
        given = [[base[name] for name in names] for base in bases]
        self.used_GA = torch.tensor(given, dtype=torch.float64, device=device)
        """Values of the last update that was not skipped; before the first update, the bases."""

    def values(self, bases: Sequence[Values]) -> list[dict[str, Value]]:
        """Returns the current values for these bases, by group."""
        return [self._group(row, dict(base)) for row, base in enumerate(bases)]

    def _group(self, group: int, values: dict[str, Value]) -> dict[str, Value]:
        theta_H = self.theta_RH[0 if self.shared else group]
        for name, theta in zip(self.tuned, theta_H, strict=True):
            base = values[name]
            assert isinstance(base, float)
            value = moved(name, base, theta)
            values[name] = float(value) if self.on_host else value
        return values

    def used(self) -> list[dict[str, Value]]:
        """Returns the values of the last update, by group."""
        rows = self.used_GA.tolist() if self.on_host else [row.unbind() for row in self.used_GA]
        return [dict(zip(self.names, row, strict=True)) for row in rows]

    def remember(self, values: Sequence[Values], gate: Tensor | None) -> None:
        """Stores the values that an update uses, unless it is skipped."""
        rows = [[group[name] for name in self.names] for group in values]
        if self.on_host:
            used_GA = torch.tensor(rows, dtype=torch.float64)
        else:
            like = self.used_GA
            flat = [v if isinstance(v, Tensor) else like.new_full((), v) for r in rows for v in r]
            used_GA = torch.stack(flat).view_as(like)
        self.used_GA = used_GA if gate is None else torch.where(gate, used_GA, self.used_GA)

    def by_theta(self, by_value_GH: Tensor) -> Tensor:
        """Turns derivatives by the values of the last update [G, H] into those by theta [R, H]."""
        columns = [self.names.index(name) for name in self.tuned]
        slopes = [slope(n, self.used_GA[:, i]) for n, i in zip(self.tuned, columns, strict=True)]
        by_theta_GH = by_value_GH * torch.stack(slopes, dim=1)
        return by_theta_GH.sum(dim=0, keepdim=True) if self.shared else by_theta_GH

    def clamp(self, gate: Tensor | None) -> None:
        """Puts theta back within its bounds after a move, and records where that was needed."""
        free_RH = self.theta_RH.clone()
        self.theta_RH.clamp_(*self.bounds)
        inside_RH = (free_RH == self.theta_RH).double()
        self.inside_RH = inside_RH if gate is None else torch.where(gate, inside_RH, self.inside_RH)

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint stores."""
        return {"theta": self.theta_RH, "inside": self.inside_RH, "used": self.used_GA}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `tensors` has returned, in place, because others refer to these tensors."""
        for name, mine in self.tensors().items():
            if tensors[name].shape != mine.shape:
                raise ValueError(f"{name}: {tuple(tensors[name].shape)}, not {tuple(mine.shape)}")
            mine.copy_(tensors[name])


def _check(
    names: Sequence[str],
    tuned: Sequence[str],
    bases: Sequence[Values],
    bounds: tuple[float, float],
) -> None:
    if unknown := sorted(set(tuned) - set(names)):
        raise ValueError(f"tune: {unknown} are not among the hyperparameters {list(names)}")
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"bounds: 0 < low <= high, got {bounds}")
    for base in bases:
        if stuck := [n for n in tuned if n in ODDS and not base[n]]:
            raise ValueError(f"tune: {stuck} are 0, and no factor leads away from there")
