"""The evaluation as one HTML file without external resources: numbers, curves and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from models.encoders.vit import VisionTransformer
from pipelines.config.as_json import to_json
from pipelines.evaluation.features import decode_all
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.probe import percent
from pipelines.evaluation.probes.registry import main_column, main_score
from pipelines.evaluation.report import samples
from pipelines.evaluation.report.curves import training_curves
from pipelines.evaluation.report.tables import (
    ROW_NAMES,
    Table,
    compared_rows,
    named_rows,
    results_rows,
    table_of,
)
from pipelines.evaluation.subject import Subject

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_report(
    results: dict[str, Any],
    subject: Subject,
    train: ProbeSet,
    test: ProbeSet,
    baseline: VisionTransformer,
    compared: Sequence[dict[str, Any]] = (),
) -> str:
    """Draws everything and fills the template.

    Args:
        results: what `pipelines.evaluate.evaluate` puts into results.json.
        subject: the encoder.
        train: the labelled set that the probes learned from.
        test: the labelled set that they were scored on; its samples are shown.
        baseline: the randomly initialised encoder of the table.
        compared: results of other evaluations, to stand beside.

    Returns:
        The HTML.
    """
    shown = samples.shown_rows(test)
    decoded = decode_all(shown, subject.preprocessing, subject.sampler)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    table = table_of({name.capitalize(): row for name, row in named_rows(results).items()})
    return environment.from_string(TEMPLATE.read_text()).render(
        results=results,
        table=table,
        meanings=_meanings(table, results),
        compared=table_of(compared_rows(results, compared)) if compared else None,
        headline=_headline(results),
        sections=training_curves(subject.run_uri),
        neighbours=samples.neighbours(results, subject, train, test),
        pca=samples.patch_colours(subject, baseline, decoded),
        masks=samples.masks(subject, shown, decoded),
        mask_note=samples.mask_note(subject.config),
        noun="clip" if subject.sampler else "image",
        counts=[len(part.labels_N) for part in (train, test)],
        provenance=_facts(results["provenance"]),
        config=to_json(subject.config) if subject.config else None,
    )


def _meanings(table: Table, results: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a column's name and the sentence that explains it, with this job's settings."""
    known = {"settings": results["settings"], "row": results["rows"]["encoder"]}
    return [(column.name, column.meaning.format(**known)) for column in table.columns]


def _headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a number and what it is: first the main probe, then its lead over each baseline."""
    rows = results_rows(results)
    score = {name: 100 * main_score(row)[0] for name, row in rows.items()}
    return [
        (f"{score['encoder']:.1f}%", f"{main_column(rows['encoder']).name} of frozen features"),
        *(
            (f"{score['encoder'] - score[name]:+.1f}", f"points over {ROW_NAMES[name]}")
            for name in score
            if name != "encoder"
        ),
        (
            f"{percent(1 / len(results['classes']))}%",
            f"chance: one class in {len(results['classes'])}",
        ),
    ]


def _facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Provenance as pairs of a plain name and its value."""
    return [
        (key.replace("_", " ").capitalize(), value if isinstance(value, str) else json.dumps(value))
        for key, value in provenance.items()
    ]
