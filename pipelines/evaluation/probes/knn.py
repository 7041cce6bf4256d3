"""The kNN probe: the most similar training samples vote for a class.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width, C classes, B rows of
one chunk, K neighbours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.arrays import (
    Array,
    accuracy_of,
    as_features,
    as_labels,
    class_count,
    class_table,
)
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask, Score

SIMILARITIES_PER_CHUNK = 2**25  # 128 MiB of fp32


def nearest(bank_ND: Array, query_QD: Array, k: int) -> tuple[Tensor, Tensor]:
    """Finds each query's `k` nearest rows of the bank by cosine similarity.

    Returns:
        similarities and row indices, both [Q, K], most similar first; K = min(k, N).
    """
    bank_ND = F.normalize(as_features(bank_ND), dim=1)
    query_QD = F.normalize(as_features(query_QD).to(bank_ND.device), dim=1)
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
    return accuracy_of(predicted_Q, query_labels)


def _run(task: ProbeTask) -> dict[str, Any]:
    bank, labels, query, truth = task.features
    votes = (task.cfg.knn_k, task.cfg.knn_temperature)
    shifted = task.shifted_features
    count = class_count(labels, truth, *(shifted or ())[1:])
    found: dict[str, Any] = {"knn_shift": None, "knn_shift_classes": None}
    for suffix, part in (("", (query, truth)), ("_shift", shifted)):
        if part is not None:
            predicted_Q = knn_predict(bank, labels, part[0], *votes)
            table = dataclasses.asdict(class_table(predicted_Q, part[1], count))
            found[f"knn{suffix}"] = accuracy_of(predicted_Q, part[1])
            found[f"knn{suffix}_classes"] = table
    return found


KNN = Probe(
    run=_run,
    score=Score("knn", "knn_shift"),
    columns=(
        Column(
            key="knn",
            name="kNN",
            meaning="Accuracy of a vote among the {settings[knn_k]} training samples with the most "
            "similar features (cosine similarity, temperature {settings[knn_temperature]}).",
        ),
    ),
)
