"""The attentive probe with one output that is a number, learned by squared error.

Shape suffixes: N clips to learn from, Q clips to be scored on, B of one step, T tokens, C = 1
output, P probes of the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.arrays import Array
from pipelines.evaluation.probes.attentive_sweep import (
    AttentiveProbes,
    Sweep,
    read_tokens,
    sweep_of,
    train_sweep,
)
from pipelines.evaluation.probes.number_probe import number_columns, scored
from pipelines.evaluation.probes.probe import Probe, ProbeTask, Score
from pipelines.evaluation.probes.readouts import AttentionReadout


@dataclass(frozen=True)
class AttentiveNumber:
    """The probe that did best on the held-out part of the training set."""

    probes: AttentiveProbes
    best: int
    held_out_r2: float | None
    """None where the held-out numbers are all equal."""
    lr: float
    weight_decay: float
    scale: tuple[float, float]
    """Mean and deviation of the training set's numbers; the probes predict standardised ones."""

    @classmethod
    def fit(
        cls, sweep: Sweep, train: Array, values: Array, device: torch.device | str = "cpu"
    ) -> AttentiveNumber:
        """Learns from tokens [N, T, D] and numbers [N]."""
        values_N = torch.as_tensor(values).double()
        mean, deviation = float(values_N.mean()), float(values_N.std(correction=0)) or 1.0
        targets_N = ((values_N - mean) / deviation).float()

        def loss(outputs_PBC: Tensor, rows: np.ndarray) -> Tensor:
            error_PB = outputs_PBC[..., 0] - targets_N[rows].to(outputs_PBC.device)
            return error_PB.square().mean(dim=1).sum()

        probes, held_out = train_sweep(sweep, train, 1, loss, device)
        truth_B = targets_N[held_out]
        read_PB = read_tokens(probes, train, _number, held_out)
        error_P = (read_PB - truth_B).square().mean(dim=1)
        best, spread = int(error_P.argmin()), float(truth_B.var(correction=0))
        r2 = 1 - float(error_P[best]) / spread if spread else None
        return cls(probes, best, r2, *sweep.grid[best], (mean, deviation))

    def predict(self, tokens: Array) -> Tensor:
        """Returns the numbers [Q] of tokens [Q, T, D], on the CPU."""
        return read_tokens(self.probes, tokens, _number)[self.best] * self.scale[1] + self.scale[0]


def _number(outputs_PBC: Tensor) -> Tensor:
    return outputs_PBC[..., 0]


def _run(task: ProbeTask) -> dict[str, Any]:
    """Probes the tokens of clips; {} for images, for which no tokens are kept."""
    if task.row not in task.train.tokens:
        return {}
    (train, values), test, shifted = task.tokens
    probe = AttentiveNumber.fit(
        sweep_of(task.cfg, task.heads, train.shape[-1]), train, values, task.device
    )
    task.readouts[task.number, "attentive"] = AttentionReadout(
        probe.probes, probe.best, probe.scale
    )
    return {
        "attentive": scored(probe.predict, test, shifted)
        | {"held_out_r2": probe.held_out_r2, "lr": probe.lr, "weight_decay": probe.weight_decay}
    }


ATTENTIVE_NUMBER = Probe(
    run=_run,
    score=Score("attentive.r2", "attentive.shift_r2"),
    columns=number_columns(
        "attentive", "Attentive", "a regression with one learned query that attends to all tokens"
    ),
)
