"""The interface of an update rule whose hyperparameters can be descended.

Notation in the files of the rules: step k took the weights from w_ to w with the gradient g. G is
the gradient at w on the next batch, a the learning rate, l the weight decay, and < , > the sum of
the product over all weights. Buffers hold the state after step k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from models.hyperoptim.tensor_lists import Lists, Value

Values = Mapping[str, Value]
"""Hyperparameters by name."""


class Rule(Protocol):
    """An update rule, with the derivative of the loss by each of its hyperparameters.

    The derivative is one step deep (Chandra et al. 2022, section 2): buffers and weights before the
    last update count as constants, so only that update's use of the hyperparameters matters.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its hyperparameters."""

    def buffers(self, base: Values, tuned: Collection[str]) -> tuple[str, ...]:
        """Returns the names of its buffers, which have a parameter's shape and start at zero."""

    def hypergradients(
        self, lists: Lists, used: Values, step: Value, tuned: Collection[str]
    ) -> dict[str, Tensor]:
        """Returns dL/dh through the last update for every h in `tuned`, each 0-dim float64.

        The result is linear in the gradients, so results of parts of a model add up, also over
        processes. It is not finite if any entry of the gradient is not.

        Args:
            lists: the weights w, the new gradients G, and the buffers.
            used: the values that the last update used.
            step: k, at least 1.
            tuned: names of the hyperparameters to differentiate by.
        """

    def update(self, lists: Lists, values: Values, step: Value, gate: Tensor | None) -> None:
        """Takes a step in place.

        Args:
            lists: weights, gradients and buffers.
            values: hyperparameters of this step.
            step: number of this step, from 1.
            gate: 0-dim bool tensor on the device: whether to step at all; None steps.
        """
