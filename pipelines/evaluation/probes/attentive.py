"""Attentive probes of frozen encoders: they classify clips, as in V-JEPA, or read numbers.

Shape suffixes: N clips to learn from, Q clips to be scored on, B of one step, T tokens, C classes
or 1 number, P probes of the sweep.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.arrays import (
    Array,
    ClassTable,
    accuracy_of,
    as_labels,
    class_count,
    class_table,
)
from pipelines.evaluation.probes.attentive_sweep import (
    LRS,
    WEIGHT_DECAYS,
    AttentiveProbes,
    Sweep,
    read_tokens,
    sweep_of,
    train_sweep,
)
from pipelines.evaluation.probes.number_probe import number_columns, scored
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask, Score
from pipelines.evaluation.probes.readouts import AttentionReadout


@dataclasses.dataclass(frozen=True)
class AttentiveProbe:
    """The probe that did best on the held-out part, and its accuracy on the test set."""

    accuracy: float
    held_out_accuracy: float
    lr: float
    weight_decay: float
    shift_accuracy: float | None = None
    classes: ClassTable | None = None
    shift_classes: ClassTable | None = None


def attentive_probe(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    *,
    heads: int,
    shifted: tuple[Array, Array] | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    lrs: tuple[float, ...] = LRS,
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS,
    standardise: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AttentiveProbe:
    """Trains a probe for every (lr, weight decay) at once and scores the best of them.

    V-JEPA reports the best probe on the test set; here the best is picked on a held-out part of the
    training set.

    Args:
        train: [N, T, D] frozen tokens, any floating type; may be a memory map.
        train_labels: [N] class indices from 0.
        test: tokens to score on; test_labels: their classes.
        shifted: a second test set, scored by the same probe.
        device: where probes run.

    The other arguments are those of `attentive_sweep.Sweep`.
    """
    sweep = Sweep(
        heads=heads,
        epochs=epochs,
        batch_size=batch_size,
        lrs=lrs,
        weight_decays=weight_decays,
        standardise=standardise,
        held_out=held_out,
        seed=seed,
    )
    fitted = fit_attentive(sweep, train, as_labels(train_labels), device)
    return _scored(fitted, (test, test_labels), shifted)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained sweep and the probe that was picked."""

    probes: AttentiveProbes
    best: int
    held_out_accuracy: float
    lr: float
    weight_decay: float

    def predict(self, tokens: Array) -> Tensor:
        """Returns the classes [Q] of tokens [Q, T, D]."""
        return read_tokens(self.probes, tokens, _classes)[self.best]


def fit_attentive(
    sweep: Sweep, train: Array, labels_N: Tensor, device: torch.device | str
) -> Fitted:
    """Trains a sweep of classifiers and picks the one that does best on its held-out part."""

    def loss(logits_PBC: Tensor, rows: np.ndarray) -> Tensor:
        targets_PB = labels_N[rows].to(logits_PBC.device).expand(len(logits_PBC), -1)
        total = F.cross_entropy(logits_PBC.flatten(0, 1), targets_PB.flatten(), reduction="sum")
        return total / len(rows)

    probes, held_out = train_sweep(sweep, train, int(labels_N.max()) + 1, loss, device)
    right_PB = read_tokens(probes, train, _classes, held_out) == labels_N[held_out].cpu()
    held_P = right_PB.sum(1) / len(held_out)
    best = int(held_P.argmax())
    return Fitted(probes, best, float(held_P[best]), *sweep.grid[best])


def _classes(logits_PBC: Tensor) -> Tensor:
    return logits_PBC.argmax(-1)


def _scored(
    fitted: Fitted, test: tuple[Array, Array], shifted: tuple[Array, Array] | None
) -> AttentiveProbe:
    count = max(fitted.probes.outputs, class_count(test[1], *(shifted or ())[1:]))
    predicted_Q = fitted.predict(test[0])
    found = AttentiveProbe(
        accuracy=accuracy_of(predicted_Q, test[1]),
        held_out_accuracy=fitted.held_out_accuracy,
        lr=fitted.lr,
        weight_decay=fitted.weight_decay,
        classes=class_table(predicted_Q, test[1], count),
    )
    if shifted is None:
        return found
    predicted_Q = fitted.predict(shifted[0])
    return dataclasses.replace(
        found,
        shift_accuracy=accuracy_of(predicted_Q, shifted[1]),
        shift_classes=class_table(predicted_Q, shifted[1], count),
    )


def _run(task: ProbeTask) -> dict[str, Any]:
    """Probes the tokens of clips; {} for images, for which no tokens are kept."""
    if task.row not in task.train.tokens:
        return {}
    (train, labels), test, shifted = task.tokens
    sweep = sweep_of(task.cfg, task.heads, train.shape[-1])
    fitted = fit_attentive(sweep, train, as_labels(labels), task.device)
    task.readouts[task.number, "attentive"] = AttentionReadout(fitted.probes, fitted.best)
    return {"attentive": dataclasses.asdict(_scored(fitted, test, shifted))}


ATTENTIVE = Probe(
    run=_run,
    score=Score("attentive.accuracy", "attentive.shift_accuracy"),
    columns=(
        Column(
            key="attentive.accuracy",
            name="Attentive probe",
            meaning="Accuracy of a classifier with one learned query that attends to all frozen "
            "tokens of a clip.",
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
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


def _run_number(task: ProbeTask) -> dict[str, Any]:
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
    run=_run_number,
    score=Score("attentive.r2", "attentive.shift_r2"),
    columns=number_columns(
        "attentive", "Attentive", "a regression with one learned query that attends to all tokens"
    ),
)
