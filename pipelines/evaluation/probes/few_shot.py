"""The few-shot probe: ridge regression from a few labelled samples, over several draws of them.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width, C classes.
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
    accuracy_of,
    as_features,
    as_labels,
    standardise,
)
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask, Row
from pipelines.evaluation.ridge import fit_ridge


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Mean and standard deviation of the accuracy over several draws of labelled samples."""

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
    train_ND, test_QD = as_features(train), as_features(test)
    labels = as_labels(train_labels).cpu().numpy()
    rng = np.random.default_rng(seed)
    scores, labelled = [], 0
    for _ in range(draws):
        rows = torch.from_numpy(_draw(labels, per_class, share, rng)).to(train_ND.device)
        support_ND, query_QD = standardise(train_ND[rows], test_QD)
        support_labels = torch.from_numpy(labels).to(rows.device)[rows]
        predicted_Q = _ridge_predict(support_ND, support_labels, query_QD)
        scores.append(accuracy_of(predicted_Q, test_labels))
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
    """Predicts by ridge regression on one-hot labels."""
    return fit_ridge(x_ND, F.one_hot(labels_N)).predict(query_QD).argmax(dim=1)


def _run(task: ProbeTask) -> dict[str, Any]:
    draws = {"few_shot_1pct": {"share": 0.01}, "few_shot_10": {"per_class": 10}}
    return {
        key: dataclasses.asdict(few_shot(*task.features, **size, seed=task.cfg.seed))  # type: ignore[arg-type]
        for key, size in draws.items()
    }


def _column(key: str, name: str, which: str) -> Column:
    def text(row: Row) -> str:
        return f"{100 * row[key]['mean']:.1f} \u00b1 {100 * row[key]['std']:.1f}"

    drawn = f"{{row[{key}][draws]}} random draws of {which} ({{row[{key}][labelled]}} samples)"
    meaning = f"Accuracy of ridge regression, mean and standard deviation over {drawn}."
    return Column(key=f"{key}.mean", name=name, text=text, meaning=meaning)


FEW_SHOT = Probe(
    run=_run,
    columns=(
        _column("few_shot_1pct", "1% of labels", "1% of the training labels"),
        _column("few_shot_10", "10 per class", "10 training labels of each class"),
    ),
)
