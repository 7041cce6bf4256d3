"""RankMe of a row's features, as a column of the evaluation."""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask, Row
from pipelines.evaluation.ranks import rankme

MOST_ROWS = 10_000
"""Training rows, the first ones, whose features are read."""


def _run(task: ProbeTask) -> dict[str, Any]:
    features_ND = task.features[0]
    width = {"width": features_ND.shape[1]}
    # Raw pixels get none: it would not describe the encoder, and their many dimensions take long.
    if task.row == "raw_pixels":
        return width
    first = features_ND[:MOST_ROWS]
    return width | {"rankme": rankme(first), "rankme_centred": rankme(first, centred=True)}


def _text(row: Row) -> str:
    return f"{row['rankme']:.1f} of {row['width']}"


RANK = Probe(
    run=_run,
    classes=False,
    columns=(
        Column(
            key="rankme",
            name="RankMe",
            text=_text,
            better=None,
            meaning="Effective number of directions that the features use, out of all dimensions; "
            "1 means that the encoder has collapsed.",
        ),
    ),
)
