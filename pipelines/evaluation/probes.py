"""Probes of frozen features: kNN, a linear probe with its sweep in one pass, few-shot ridge.

Every accuracy is a fraction in [0, 1]. No probe ever picks a setting by the test labels.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width, C classes, H heads of
the sweep, B rows of one step, K neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Array: TypeAlias = np.ndarray | Tensor

SIMILARITIES_PER_CHUNK = 2**25  # 128 MiB of fp32
PROBE_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PROBE_WEIGHT_DECAYS = (0.0, 0.1)
MOTION_WITHIN = 0.05
"""A task is one of motion if a single frame reads at most this much above guessing."""


def nearest(bank_ND: Array, query_QD: Array, k: int) -> tuple[Tensor, Tensor]:
    """Finds each query's `k` nearest rows of the bank by cosine similarity.

    Returns:
        similarities and row indices, both [Q, K], most similar first; K = min(k, N).
    """
    bank_ND = F.normalize(_features(bank_ND), dim=1)
    query_QD = F.normalize(_features(query_QD).to(bank_ND.device), dim=1)
    k = min(k, len(bank_ND))
    rows = max(1, SIMILARITIES_PER_CHUNK // len(bank_ND))
    found = [(chunk_BD @ bank_ND.T).topk(k, dim=1) for chunk_BD in torch.split(query_QD, rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def knn_predict(
    bank: Array, bank_labels: Array, query: Array, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classifies by the `k` nearest neighbours, each voting exp(similarity / temperature).

    The protocol of Wu et al. 2018, section 3.4, used since by DINO and others.

    Args:
        bank: [N, D] features; `bank_labels`: [N] class indices from 0.
        query: [Q, D] features.

    Returns:
        Predicted class indices [Q]; a tie goes to the lower class.
    """
    similarity_QK, index_QK = nearest(bank, query, k)
    labels_N = as_labels(bank_labels).to(index_QK.device)
    # Relative to the best neighbour: the same vote, and exp cannot overflow.
    weight_QK = ((similarity_QK - similarity_QK[:, :1]) / temperature).exp()
    votes_QC = torch.zeros(len(index_QK), int(labels_N.max()) + 1, device=index_QK.device)
    votes_QC.scatter_add_(1, labels_N[index_QK], weight_QK)
    return votes_QC.argmax(dim=1)


def knn_accuracy(
    bank: Array,
    bank_labels: Array,
    query: Array,
    query_labels: Array,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Returns the share of queries that `knn_predict` classifies as `query_labels` [Q]."""
    predicted_Q = knn_predict(bank, bank_labels, query, k, temperature)
    return _accuracy(predicted_Q, query_labels)


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """The head that did best on the held-out part, and its score on the test set."""

    accuracy: float
    held_out_accuracy: float
    lr: float
    weight_decay: float
    shift_accuracy: float | None = None


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
        shifted: a second test set, scored by the same head.
        held_out: share of the training rows that picks the head instead of training it.
    """
    grid = [(lr, decay) for lr in lrs for decay in weight_decays]
    train_ND, test_QD = _standardise(_features(train), _features(test))
    labels_N = as_labels(train_labels).to(train_ND.device)
    order_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(train_ND)))
    order_N, count = order_N.to(train_ND.device), max(1, round(held_out * len(order_N)))
    picks_N, fits_N = order_N[:count], order_N[count:]
    heads = _Heads(train_ND.shape[1], int(labels_N.max()) + 1, grid, train_ND.device)
    _fit(heads, train_ND[fits_N], labels_N[fits_N], epochs, batch_size, seed)
    held_out_H = heads.accuracy(train_ND[picks_N], labels_N[picks_N])
    best = int(held_out_H.argmax())
    test_H = heads.accuracy(test_QD, as_labels(test_labels).to(train_ND.device))
    found = LinearProbe(float(test_H[best]), float(held_out_H[best]), *grid[best])
    if shifted is None:
        return found
    shifted_QD = _standardise(_features(train), _features(shifted[0]))[1]
    shifted_H = heads.accuracy(shifted_QD, as_labels(shifted[1]).to(train_ND.device))
    return dataclasses.replace(found, shift_accuracy=float(shifted_H[best]))


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


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Accuracy over several draws of the labelled few."""

    mean: float
    std: float
    labelled: int
    draws: int


def few_shot(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    *,
    per_class: int | None = None,
    share: float | None = None,
    draws: int = 5,
    seed: int = 0,
) -> FewShot:
    """Learns from a few labelled rows: ridge regression on one-hot labels, several draws.

    Each draw takes `per_class` rows of every class (or all a class has), or `share` of every class
    (at least one row). The ridge is picked by leave-one-out error on the draw itself.

    Raises:
        ValueError: unless exactly one of `per_class` and `share` is given.
    """
    if (per_class is None) == (share is None):
        raise ValueError("give exactly one of per_class and share")
    train_ND, test_QD = _features(train), _features(test)
    labels = as_labels(train_labels).cpu().numpy()
    rng = np.random.default_rng(seed)
    scores, labelled = [], 0
    for _ in range(draws):
        rows = torch.from_numpy(_draw(labels, per_class, share, rng)).to(train_ND.device)
        support_ND, query_QD = _standardise(train_ND[rows], test_QD)
        support_labels = torch.from_numpy(labels).to(rows.device)[rows]
        predicted_Q = _ridge_predict(support_ND, support_labels, query_QD)
        scores.append(_accuracy(predicted_Q, test_labels))
        labelled = len(rows)
    return FewShot(float(np.mean(scores)), float(np.std(scores)), labelled, draws)


def _draw(
    labels: np.ndarray, per_class: int | None, share: float | None, rng: np.random.Generator
) -> np.ndarray:
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = per_class if share is None else max(1, round(share * len(rows)))
        chosen.append(rng.permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))


def _ridge_predict(x_ND: Tensor, labels_N: Tensor, query_QD: Tensor) -> Tensor:
    """Ridge with the penalty of least leave-one-out squared error, from one SVD.

    With hat matrix H, the leave-one-out residual is (y - Hy) / (1 - diag H) (Allen 1974).
    """
    y_NC = F.one_hot(labels_N).double()
    mean_C = y_NC.mean(dim=0)
    u_NR, s_R, vt_RD = torch.linalg.svd(x_ND.double(), full_matrices=False)
    best: tuple[float, Tensor] | None = None
    for penalty in s_R.max() ** 2 * torch.logspace(-5, 1, 13, dtype=torch.double).to(s_R.device):
        shrink_R = s_R**2 / (s_R**2 + penalty)
        fitted_NC = (u_NR * shrink_R) @ (u_NR.T @ (y_NC - mean_C)) + mean_C
        leverage_N = (u_NR**2 * shrink_R).sum(dim=1) + 1 / len(x_ND)
        error = (((y_NC - fitted_NC) / (1 - leverage_N).clamp_min(1e-6)[:, None]) ** 2).mean()
        if best is None or float(error) < best[0]:
            best = (float(error), penalty)
    assert best is not None
    weight_DC = (vt_RD.T * (s_R / (s_R**2 + best[1]))) @ (u_NR.T @ (y_NC - mean_C))
    predicted_Q: Tensor = (query_QD.double() @ weight_DC + mean_C).argmax(dim=1)
    return predicted_Q


def _standardise(train_ND: Tensor, test_QD: Tensor) -> tuple[Tensor, Tensor]:
    mean_D, std_D = train_ND.mean(dim=0), train_ND.std(dim=0, correction=0)
    # A dimension that never varies says nothing: dividing by 1 leaves it at zero.
    std_D = torch.where(std_D > 1e-6 * std_D.max(), std_D, torch.ones_like(std_D))
    return (train_ND - mean_D) / std_D, (test_QD.to(train_ND.device) - mean_D) / std_D


def _features(values: Array) -> Tensor:
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


def _accuracy(predicted_Q: Tensor, labels: Array) -> float:
    return float((predicted_Q.cpu() == as_labels(labels).cpu()).double().mean())


def task_of(single_frame: float, test_labels: Array) -> dict[str, str | float]:
    """Whether a clip's label is told by motion or by appearance.

    Args:
        single_frame: best accuracy of the probes that saw one frame of every clip.
        test_labels: [Q] class indices from 0; the commonest one's share is what guessing gets.
    """
    labels_Q = as_labels(test_labels)
    chance = float(labels_Q.bincount().max()) / len(labels_Q)
    kind = "motion" if single_frame <= chance + MOTION_WITHIN else "appearance"
    return {"kind": kind, "chance": chance, "single_frame": single_frame}
