"""Features and labels as the probes take them: checked tensors, standardised, and their score.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray | Tensor


def standardise(train_ND: Tensor, test_QD: Tensor) -> tuple[Tensor, Tensor]:
    """Brings every dimension to mean 0 and deviation 1 by the statistics of the training rows."""
    mean_D, std_D = train_ND.mean(dim=0), train_ND.std(dim=0, correction=0)
    # A dimension that never varies says nothing: dividing by 1 leaves it at zero.
    std_D = torch.where(std_D > 1e-6 * std_D.max(), std_D, torch.ones_like(std_D))
    return (train_ND - mean_D) / std_D, (test_QD.to(train_ND.device) - mean_D) / std_D


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
