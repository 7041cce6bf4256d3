"""Scores of probes that read numbers: R2, mean absolute error, rank correlation; their columns.

Shape suffixes: Q rows that are scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from pipelines.evaluation.arrays import Array
from pipelines.evaluation.probes.probe import Column, Row, look_up


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


def scored(
    predict: Callable[[Array], Array],
    test: tuple[Array, Array],
    shifted: tuple[Array, Array] | None,
) -> dict[str, Any]:
    """Scores a fitted probe.

    Args:
        predict: returns the numbers [Q] of features or tokens, [Q, ...].
        test: features or tokens of the test set, and its numbers [Q].
        shifted: the same for the second test set; None without one.

    Returns:
        The fields of `NumberScore`, and the same with `shift_` before them, None without a second
        set.
    """
    found = dataclasses.asdict(number_score(predict(test[0]), test[1]))
    again = dict.fromkeys(found)
    if shifted is not None:
        again = dataclasses.asdict(number_score(predict(shifted[0]), shifted[1]))
    return found | {f"shift_{key}": value for key, value in again.items()}


def number_columns(key: str, name: str, how: str) -> tuple[Column, ...]:
    """Returns the columns of a probe's scores, R2 first.

    Args:
        key: where a row holds the scores.
        name: the probe's name.
        how: how the probe learns, as the end of a sentence.
    """
    r2 = f"R2 of {how}: 1 is perfect, 0 is no better than always saying the test set's mean."
    return (
        Column(key=f"{key}.r2", name=f"{name} R2", meaning=r2, text=_text(f"{key}.r2")),
        Column(
            key=f"{key}.mae",
            name=f"{name} MAE",
            better="lower",
            meaning="Mean absolute error of the same probe, in the units of the number.",
            text=lambda row: f"{look_up(row, f'{key}.mae'):.4g}",
        ),
        Column(
            key=f"{key}.spearman",
            name=f"{name} rank",
            meaning="Spearman's rank correlation of the same probe's answers with the truth.",
            text=_text(f"{key}.spearman"),
        ),
    )


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: f"{look_up(row, key):.3f}"
