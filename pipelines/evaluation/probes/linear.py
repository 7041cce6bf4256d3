"""The linear probe: softmax heads on frozen features, a whole sweep of them in one pass.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width, C classes, H heads of
the sweep, B rows of one step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.arrays import (
    Array,
    ClassTable,
    Scaling,
    accuracy_of,
    as_features,
    as_labels,
    class_count,
    class_table,
    held_out_split,
)
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask, Score
from pipelines.evaluation.probes.readouts import LinearReadout

PROBE_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PROBE_WEIGHT_DECAYS = (0.0, 0.1)


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """The head that did best on the held-out part, and its accuracy on the test set."""

    accuracy: float
    held_out_accuracy: float
    lr: float
    weight_decay: float
    shift_accuracy: float | None = None
    classes: ClassTable | None = None
    shift_classes: ClassTable | None = None


def linear_probe(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    *,
    shifted: tuple[Array, Array] | None = None,
    epochs: int = 50,
    batch_size: int = 256,
    lrs: tuple[float, ...] = PROBE_LRS,
    weight_decays: tuple[float, ...] = PROBE_WEIGHT_DECAYS,
    held_out: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """Trains a softmax head for every (lr, weight decay) at once and scores the best of them.

    Features are standardised by training statistics (a BatchNorm without affine); SGD with
    momentum 0.9, cosine to zero. A held-out share of the training rows picks the head, so the test
    labels are read once.

    Args:
        train: [N, D] features; `train_labels`: [N] class indices from 0.
        test: [Q, D] features; `test_labels`: [Q].
        shifted: features and labels of a second test set, scored by the same head.
        held_out: share of the training rows that picks the head instead of training it.
    """
    grid = [(lr, decay) for lr in lrs for decay in weight_decays]
    fitted = fit_linear(train, train_labels, grid, epochs, batch_size, held_out, seed)
    return _scored(fitted, (test, test_labels), shifted)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The head that was picked, on features that `scaling` standardises."""

    scaling: Scaling
    weight_DC: Tensor
    bias_C: Tensor
    held_out_accuracy: float
    lr: float
    weight_decay: float

    def predict(self, features: Array) -> Tensor:
        """Returns the classes [Q] of features [Q, D]."""
        chunks = torch.split(as_features(features), 4096)
        return torch.cat([self._logits(x_BD).argmax(dim=-1) for x_BD in chunks])

    def _logits(self, x_BD: Tensor) -> Tensor:
        return torch.addmm(self.bias_C, self.scaling(x_BD), self.weight_DC)


def fit_linear(
    train: Array,
    train_labels: Array,
    grid: list[tuple[float, float]],
    epochs: int,
    batch_size: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
) -> Fitted:
    """Trains a softmax head for every (lr, weight decay) and picks the best on the held-out part.

    For the arguments see `linear_probe`.
    """
    scaling = Scaling.of(as_features(train))
    train_ND = scaling(as_features(train))
    labels_N = as_labels(train_labels).to(train_ND.device)
    split = held_out_split(len(train_ND), held_out, seed)
    picks_N, fits_N = (torch.from_numpy(rows).to(train_ND.device) for rows in split)
    heads = _Heads(train_ND.shape[1], int(labels_N.max()) + 1, grid, train_ND.device)
    _fit(heads, train_ND[fits_N], labels_N[fits_N], epochs, batch_size, seed)
    held_out_H = heads.accuracy(train_ND[picks_N], labels_N[picks_N])
    best = int(held_out_H.argmax())
    return Fitted(scaling, *heads.head(best), float(held_out_H[best]), *grid[best])


def _scored(
    fitted: Fitted, test: tuple[Array, Array], shifted: tuple[Array, Array] | None
) -> LinearProbe:
    count = max(len(fitted.bias_C), class_count(test[1], *(shifted or ())[1:]))
    predicted_Q = fitted.predict(test[0])
    found = LinearProbe(
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


class _Heads:
    """H independent softmax heads in one [D, H*C] matrix, each with its own lr and decay."""

    def __init__(
        self, width: int, classes: int, grid: list[tuple[float, float]], device: torch.device
    ) -> None:
        self.shape = (len(grid), classes)
        self.weight = torch.zeros(width, len(grid) * classes, device=device)
        self.bias = torch.zeros(len(grid) * classes, device=device)
        self.velocity = (torch.zeros_like(self.weight), torch.zeros_like(self.bias))
        columns = torch.tensor(grid, device=device).repeat_interleave(classes, dim=0)
        self.lr, self.decay = columns[:, 0], columns[:, 1]

    def logits(self, x_BD: Tensor) -> Tensor:
        return torch.addmm(self.bias, x_BD, self.weight).view(len(x_BD), *self.shape)

    def step(self, x_BD: Tensor, labels_B: Tensor, lr_scale: float) -> None:
        # Softmax regression's gradient in closed form: x^T (p - onehot) / B, for all heads at once.
        error_BHC = self.logits(x_BD).softmax(dim=-1)
        error_BHC -= F.one_hot(labels_B, self.shape[1])[:, None]
        error = error_BHC.flatten(1) / len(x_BD)
        self.velocity[0].mul_(0.9).addmm_(x_BD.T, error).addcmul_(self.weight, self.decay)
        self.velocity[1].mul_(0.9).add_(error.sum(dim=0))
        self.weight.addcmul_(self.velocity[0], self.lr, value=-lr_scale)
        self.bias.addcmul_(self.velocity[1], self.lr, value=-lr_scale)

    def head(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the weight [D, C] and the bias [C] of one head."""
        weight_DHC = self.weight.view(len(self.weight), *self.shape)
        return weight_DHC[:, index].contiguous(), self.bias.view(self.shape)[index]

    def accuracy(self, x_QD: Tensor, labels_Q: Tensor) -> Tensor:
        hits = [
            (self.logits(x_BD).argmax(dim=-1) == labels_B[:, None]).sum(dim=0)
            for x_BD, labels_B in zip(
                torch.split(x_QD, 4096), torch.split(labels_Q, 4096), strict=True
            )
        ]
        return torch.stack(hits).sum(dim=0) / len(x_QD)


def _fit(
    heads: _Heads, x_ND: Tensor, labels_N: Tensor, epochs: int, batch_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(x_ND) / batch_size)
    for epoch in range(epochs):
        order_N = torch.randperm(len(x_ND), generator=generator).to(x_ND.device)
        for index, rows_B in enumerate(torch.split(order_N, batch_size)):
            progress = (epoch + index / steps) / epochs
            heads.step(x_ND[rows_B], labels_N[rows_B], 0.5 * (1 + math.cos(math.pi * progress)))


def _run(task: ProbeTask) -> dict[str, Any]:
    train, labels, test, truth = task.features
    grid = [(lr, decay) for lr in PROBE_LRS for decay in PROBE_WEIGHT_DECAYS]
    fitted = fit_linear(train, labels, grid, task.cfg.probe_epochs, seed=task.cfg.seed)
    scale_D1 = fitted.scaling.std_D[:, None]
    task.readouts[task.number, "linear"] = LinearReadout(
        fitted.scaling.mean_D, fitted.weight_DC / scale_D1, fitted.bias_C
    )
    found = _scored(fitted, (test, truth), task.shifted_features)
    return {"linear": dataclasses.asdict(found)}


LINEAR = Probe(
    run=_run,
    score=Score("linear.accuracy", "linear.shift_accuracy"),
    columns=(
        Column(
            key="linear.accuracy",
            name="Linear probe",
            meaning="Accuracy of a linear classifier trained on the frozen features of all "
            "training samples.",
        ),
    ),
)
