"""How well numbers are predicted: R2, mean absolute error, and rank correlation.

Shape suffixes: Q rows that are scored.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

from pipelines.evaluation.arrays import Array


@dataclasses.dataclass(frozen=True)
class NumberScore:
    """Scores of a prediction; None where the truth (or, for Spearman, a prediction) is constant."""

    r2: float | None
    """1 minus the squared error relative to that of the truth's own mean: 1 is perfect, 0 is no
    better than the mean, and below 0 is worse."""
    mae: float
    """Mean absolute error, in the units of the number."""
    spearman: float | None
    """Spearman's rank correlation, from -1 to 1; it does not see a wrong scale or offset."""


def number_score(predicted: Array, truth: Array) -> NumberScore:
    """Scores predictions [Q] of finite numbers [Q].

    Raises:
        ValueError: there are no rows, or the two differ in length.
    """
    predicted_Q, truth_Q = (np.asarray(values, np.float64) for values in (predicted, truth))
    if not len(truth_Q) or predicted_Q.shape != truth_Q.shape:
        raise ValueError(f"{predicted_Q.shape} predictions of {truth_Q.shape} numbers")
    error_Q, spread_Q = predicted_Q - truth_Q, truth_Q - truth_Q.mean()
    varies = np.ptp(truth_Q) > 0
    ranked = varies and np.ptp(predicted_Q) > 0
    return NumberScore(
        r2=float(1 - (error_Q @ error_Q) / (spread_Q @ spread_Q)) if varies else None,
        mae=float(np.abs(error_Q).mean()),
        spearman=float(stats.spearmanr(predicted_Q, truth_Q).statistic) if ranked else None,
    )
