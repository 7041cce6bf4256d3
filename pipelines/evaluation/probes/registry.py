"""Every probe of an evaluation, in the order of the columns. A new probe is entered here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipelines.evaluation.probe_sets import number_set
from pipelines.evaluation.probes.attentive import ATTENTIVE, ATTENTIVE_NUMBER
from pipelines.evaluation.probes.few_shot import FEW_SHOT
from pipelines.evaluation.probes.knn import KNN
from pipelines.evaluation.probes.linear import LINEAR
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask, Row, look_up, percent
from pipelines.evaluation.probes.rank import RANK
from pipelines.evaluation.probes.ridge import RIDGE

PROBES = [ATTENTIVE, KNN, LINEAR, FEW_SHOT, RANK]
"""Probes of a row. The first one whose score a row has sums the row up."""
NUMBER_PROBES = [ATTENTIVE_NUMBER, RIDGE]
"""Probes of each number of a row, in the same way."""


def run_probes(task: ProbeTask) -> dict[str, Any]:
    """Returns all numbers of one row, as results.json holds them."""
    found: dict[str, Any] = {}
    for probe in PROBES:
        if task.cfg.has_classes or not probe.classes:
            found |= probe.run(task)
    numbers = {name: _run_number(task, name) for name in task.train.numbers}
    return found | ({"numbers": numbers} if numbers else {})


def _run_number(task: ProbeTask, name: str) -> dict[str, Any]:
    """Returns what the probes of numbers say of one, learned where its values are finite."""
    train, test, shifted = (
        None if part is None else number_set(part, name)
        for part in (task.train, task.test, task.shifted)
    )
    assert train is not None
    assert test is not None
    part = dataclasses.replace(task, train=train, test=test, shifted=shifted, number=name)
    found: dict[str, Any] = {}
    for probe in NUMBER_PROBES:
        found |= probe.run(part)
    return found


def columns() -> list[Column]:
    """Returns the columns of every table of results, in order."""
    return [*(column for probe in PROBES for column in probe.columns), SHIFTED]


def number_columns() -> list[Column]:
    """Returns the columns of every table of one number, in order."""
    return [*(column for probe in NUMBER_PROBES for column in probe.columns), *SHIFTED_NUMBER]


def scores(row: Row, probes: Sequence[Probe] | None = None) -> list[tuple[Probe, float]]:
    """Returns the probes that learned from all training labels, and their scores, in order.

    Args:
        row: a row of results.json, or one number of it.
        probes: the probes to look for; None for `PROBES`.
    """
    found = []
    for probe in PROBES if probes is None else probes:
        value = look_up(row, probe.score.key) if probe.score else None
        if value is not None:
            found.append((probe, value))
    return found


def scored_probes() -> dict[str, Probe]:
    """Returns the probes that learn classes from all training labels, by their keys in a row."""
    return {probe.score.probe: probe for probe in PROBES if probe.score is not None}


def accuracies(row: Row, *, shifted: bool = False) -> dict[str, float]:
    """Returns the accuracies of those probes that a row has, by their keys.

    Args:
        row: a row of results.json.
        shifted: read those on the second test set.
    """
    found = {}
    for key, probe in scored_probes().items():
        assert probe.score is not None
        value = look_up(row, probe.score.shift_key if shifted else probe.score.key)
        if value is not None:
            found[key] = value
    return found


def main_column(row: Row) -> Column:
    """Returns the column that sums a row up: the attentive probe of clips, kNN of images."""
    return scores(row)[0][0].columns[0]


def main_score(row: Row) -> tuple[float, float | None]:
    """Returns a row's main accuracy on the test set and on the shifted one, where there is one."""
    probe, score = scores(row)[0]
    assert probe.score is not None
    return score, look_up(row, probe.score.shift_key)


def main_number(row: Row) -> str | None:
    """Returns the key of the probe that sums a number of a row up; None where no R2 is known."""
    for probe, _ in scores(row, NUMBER_PROBES):
        assert probe.score is not None
        return probe.score.probe
    return None


def best_score(row: Row) -> float:
    """Returns the best accuracy of the probes that learned from all training labels."""
    return max(score for _, score in scores(row))


def _shifted(row: Row) -> float | None:
    return main_score(row)[1] if scores(row) else None


def _shifted_text(row: Row) -> str:
    score, shifted = main_score(row)
    assert shifted is not None
    return f"{percent(shifted)} ({100 * (shifted - score):+.1f})"


SHIFTED = Column(
    key="shifted",
    name="Shifted",
    read=_shifted,
    text=_shifted_text,
    meaning="The first column's accuracy on the second test set, by the very same probe, and its "
    "change in points.",
)


def _shifted_number(metric: str, name: str, form: str) -> Column:
    def read(row: Row) -> float | None:
        return look_up(row, f"{main_number(row)}.shift_{metric}")

    def text(row: Row) -> str:
        score, shifted = look_up(row, f"{main_number(row)}.{metric}"), read(row)
        assert score is not None
        assert shifted is not None
        return f"{shifted:{form}} ({shifted - score:+{form}})"

    return Column(
        key=f"shifted_{metric}",
        name=f"Shifted {name}",
        better="lower" if metric == "mae" else "higher",
        read=read,
        text=text,
        meaning=f"{name} of the first column's probe on the second test set, and its change.",
    )


SHIFTED_NUMBER = (
    _shifted_number("r2", "R2", ".3f"),
    _shifted_number("mae", "MAE", ".4g"),
)
