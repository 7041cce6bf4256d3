"""The ridge probe: a number as a linear function of pooled features.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.arrays import Array, Scaling, as_features
from pipelines.evaluation.probes.number_probe import number_columns, scored
from pipelines.evaluation.probes.probe import Probe, ProbeTask, Score
from pipelines.evaluation.probes.readouts import LinearReadout
from pipelines.evaluation.ridge import Ridge, fit_ridge


@dataclass(frozen=True)
class RidgeProbe:
    """Ridge regression of a number on features that `scaling` standardises."""

    scaling: Scaling
    ridge: Ridge
    left_out_r2: float | None
    """R2 of the leave-one-out predictions of the training set; None where it is constant."""

    @classmethod
    def fit(cls, train: Array, values: Array) -> RidgeProbe:
        """Learns from features [N, D] and numbers [N]."""
        features_ND, values_N = as_features(train).double(), torch.as_tensor(values).double()
        scaling = Scaling.of(features_ND)
        ridge = fit_ridge(scaling(features_ND), values_N[:, None])
        spread = float(values_N.var(correction=0))
        return cls(scaling, ridge, 1 - ridge.left_out_error / spread if spread else None)

    def predict(self, features: Array) -> Tensor:
        """Returns the numbers [Q] of features [Q, D], on the CPU."""
        return self.ridge.predict(self.scaling(as_features(features).double()))[:, 0].cpu()

    @property
    def readout(self) -> LinearReadout:
        """What every token adds to the number."""
        weight_DC = self.ridge.weight_DC / self.scaling.std_D[:, None]
        return LinearReadout(self.scaling.mean_D, weight_DC, self.ridge.offset_C)


def _run(task: ProbeTask) -> dict[str, Any]:
    train, values, test, truth = task.features
    probe = RidgeProbe.fit(train, values)
    task.readouts[task.number, "ridge"] = probe.readout
    found = scored(probe.predict, (test, truth), task.shifted_features)
    return {
        "ridge": found | {"left_out_r2": probe.left_out_r2, "penalty": probe.ridge.penalty},
    }


RIDGE = Probe(
    run=_run,
    score=Score("ridge.r2", "ridge.shift_r2"),
    columns=number_columns("ridge", "Ridge", "ridge regression on the mean of the tokens"),
)
