"""What an update rule must offer to have its hyperparameters descended.

Notation of the rules' files, for step k that took weights w_ to w: g_ the gradient it used, G the
gradient at w on the next batch, a the learning rate, l the weight decay, < , > the sum over all
weights of the product. Buffers hold the state after step k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from models.hyperoptim.tensor_lists import Lists, Value

Values = Mapping[str, Value]
"""Hyperparameters by name."""


class Rule(Protocol):
    """An update rule with the derivative of the loss by each of its hyperparameters.

    One step deep (Chandra et al. 2022, section 2): the buffers and the weights before the last update
    count as constants, so the derivative runs from the hyperparameters of that update to w alone.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Its hyperparameters."""

    def buffers(self, base: Values, tuned: Collection[str]) -> tuple[str, ...]:
        """Names of the buffers, each of the parameter's shape, zero before the first step."""

    def hypergradients(
        self, lists: Lists, used: Values, step: Value, tuned: Collection[str]
    ) -> dict[str, Tensor]:
        """dL/dh for every hyperparameter h in `tuned`, through the last update: 0-dim float64.

        Linear in the gradients, so that parts of a model are summed, in lists and over processes.
        Not a number if any entry of the gradient is not finite.

        Args:
            lists: The weights w, the new gradients G, the buffers.
            used: The values that the last update used.
            step: k, at least 1.
            tuned: What to differentiate by.
        """

    def update(self, lists: Lists, values: Values, step: Value, gate: Tensor | None) -> None:
        """Takes a step in place.

        Args:
            lists: Weights, gradients, buffers.
            values: Hyperparameters of this step.
            step: Its number, from 1.
            gate: 0-dim bool tensor that says on the device whether to step at all; None for yes.
        """
