"""Every probe of an evaluation, in the order of the columns. A new probe is entered here."""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.probes.attentive import ATTENTIVE
from pipelines.evaluation.probes.few_shot import FEW_SHOT
from pipelines.evaluation.probes.knn import KNN
from pipelines.evaluation.probes.linear import LINEAR
from pipelines.evaluation.probes.probe import Column, ProbeTask, Row, percent
from pipelines.evaluation.probes.rank import RANK

PROBES = [ATTENTIVE, KNN, LINEAR, FEW_SHOT, RANK]


def run_probes(task: ProbeTask) -> dict[str, Any]:
    """Returns all numbers of one row, as results.json holds them."""
    found: dict[str, Any] = {}
    for probe in PROBES:
        found |= probe.run(task)
    return found


def columns() -> list[Column]:
    """Returns the columns of every table of results, in order."""
    return [*(column for probe in PROBES for column in probe.columns), SHIFTED]


def main_column(row: Row) -> Column:
    """Returns the column that sums a row up: the attentive probe of clips, kNN of images."""
    return (ATTENTIVE if "attentive" in row else KNN).columns[0]


def main_score(row: Row) -> tuple[float, float | None]:
    """Returns a row's main accuracy on the test set and on the shifted one, where there is one."""
    if "attentive" in row:
        return row["attentive"]["accuracy"], row["attentive"]["shift_accuracy"]
    return row["knn"], row.get("knn_shift")


def _shifted_text(row: Row) -> str:
    score, shifted = main_score(row)
    assert shifted is not None
    return f"{percent(shifted)} ({100 * (shifted - score):+.1f})"


SHIFTED = Column(
    key="shifted",
    name="Shifted",
    read=lambda row: main_score(row)[1],
    text=_shifted_text,
    meaning="The first column's accuracy on the second test set, by the very same probe, and its "
    "change in points.",
)
