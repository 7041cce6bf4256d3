"""SIGReg on any monitored tensor of any objective: a guard against collapse that needs no teacher.

Shape legend: N rows, D width.
"""

from __future__ import annotations

from torch import nn

from models.objectives.objective import Batch, Objective, Output
from models.objectives.sigreg import SIGReg


class Regularized(Objective):
    """An objective plus `weight` times SIGReg of one of its `Output.monitored` [N, D].

    Args:
        objective: the objective.
        sigreg: the statistic.
        weight: of the statistic.
        on: name of the tensor.

    Raises:
        ValueError: the objective monitors no such tensor, or it has no gradient.
    """

    def __init__(self, objective: Objective, sigreg: SIGReg, *, weight: float, on: str) -> None:
        super().__init__()
        if on not in objective.regularizable:
            raise ValueError(
                f"--objective.regularize: {on!r} is no tensor with a gradient that "
                f"{type(objective).__name__} monitors; one of {', '.join(objective.regularizable)}"
            )
        self.objective, self.sigreg = objective, sigreg
        self.weight, self.on = weight, on

    @property
    def inputs(self) -> tuple[str, ...]:
        """The objective's."""
        return self.objective.inputs

    @property
    def feature_encoder(self) -> nn.Module:
        """The objective's."""
        return self.objective.feature_encoder

    @property
    def regularizable(self) -> tuple[str, ...]:
        """The objective's."""
        return self.objective.regularizable

    @property
    def watched(self) -> dict[str, int]:
        """The objective's."""
        return self.objective.watched

    def forward(self, batch: Batch) -> Output:
        """The objective's output with the larger loss; the statistic is its metric `regularizer`."""
        output: Output = self.objective(batch)
        statistic = self.sigreg(output.monitored[self.on])
        return Output(
            output.loss + self.weight * statistic,
            {**output.metrics, "regularizer": statistic.detach()},
            output.monitored,
        )

    def after_step(self, step: int, total_steps: int) -> None:
        """The objective's, and other slices for the next step."""
        self.objective.after_step(step, total_steps)
        self.sigreg.advance()
