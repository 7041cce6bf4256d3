"""Features and labels as the probes take them: checked tensors, standardised, and their score.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray | Tensor

MOST_CONFUSED = 100
"""With more classes than this, results.json holds no confusion matrix."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Brings every dimension to mean 0 and deviation 1 by the statistics of the training rows."""

    mean_D: Tensor
    std_D: Tensor

    @classmethod
    def of(cls, train_ND: Tensor) -> Scaling:
        """Takes the statistics of these rows."""
        mean_D, std_D = train_ND.mean(dim=0), train_ND.std(dim=0, correction=0)
        # A dimension that never varies says nothing: dividing by 1 leaves it at zero.
        return cls(mean_D, torch.where(std_D > 1e-6 * std_D.max(), std_D, torch.ones_like(std_D)))

    def __call__(self, x_QD: Tensor) -> Tensor:
        """Scales rows, on the device of the statistics."""
        return (x_QD.to(self.mean_D.device) - self.mean_D) / self.std_D


def standardise(train_ND: Tensor, test_QD: Tensor) -> tuple[Tensor, Tensor]:
    """Scales both sets by the statistics of the training rows."""
    scaling = Scaling.of(train_ND)
    return scaling(train_ND), scaling(test_QD)


def held_out_split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the rows of a training set that choose settings, at least one, and all others."""
    order = np.random.default_rng(seed).permutation(count)
    held = max(1, round(share * count))
    return order[:held], order[held:]


def as_features(values: Array) -> Tensor:
    """Returns features as fp32 [N, D]; a ValueError if they have another shape or no row."""
    features_ND = torch.as_tensor(values).float()
    if features_ND.ndim != 2 or len(features_ND) == 0:
        raise ValueError(f"features must be [N, D] with N > 0, got {tuple(features_ND.shape)}")
    return features_ND


def as_labels(values: Array) -> Tensor:
    """Returns class indices from 0 as int64 [N]; a ValueError if any is negative."""
    labels_N = torch.as_tensor(values).long()
    if labels_N.numel() and int(labels_N.min()) < 0:
        raise ValueError("labels must be class indices from 0; drop the unlabelled rows first")
    return labels_N


def accuracy_of(predicted_Q: Tensor, labels: Array) -> float:
    """Returns the share of predictions [Q] that equal the labels [Q]."""
    return float((predicted_Q.cpu() == as_labels(labels).cpu()).double().mean())


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """How the samples of each class were classified."""

    accuracy: list[float | None]
    """Share of each class that was recognised, [C]; None for a class without a sample."""
    confusion: list[list[int]] | None
    """Number of samples by true class (row) and predicted class (column), [C, C]; None where there
    are more than `MOST_CONFUSED` classes."""


def class_count(*sets: Array) -> int:
    """Returns the number of classes that the labels of these sets need: the largest plus 1."""
    return 1 + max(int(as_labels(labels).max()) for labels in sets)


def class_table(predicted_Q: Tensor, labels: Array, count: int) -> ClassTable:
    """Counts predictions [Q] by the true class [Q], both below `count`."""
    pairs_Q = as_labels(labels).cpu() * count + predicted_Q.cpu()
    found_CC = pairs_Q.bincount(minlength=count**2).view(count, count)
    shares = zip(found_CC.diagonal().tolist(), found_CC.sum(1).tolist(), strict=True)
    return ClassTable(
        accuracy=[hits / total if total else None for hits, total in shares],
        confusion=found_CC.tolist() if count <= MOST_CONFUSED else None,
    )
