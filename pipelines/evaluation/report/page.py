"""The evaluation as one HTML file without external resources: numbers, curves and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from models.encoders.vit import VisionTransformer
from pipelines.config.as_json import to_json
from pipelines.evaluation.beliefs.study import Study
from pipelines.evaluation.features import decode_all
from pipelines.evaluation.near_duplicates import near_duplicate_notes
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.probe import Column, Readouts, percent
from pipelines.evaluation.probes.registry import (
    NUMBER_PROBES,
    main_column,
    main_score,
    number_columns,
    scores,
)
from pipelines.evaluation.report import samples
from pipelines.evaluation.report.beliefs import belief_section, environment
from pipelines.evaluation.report.block_scores import block_charts, block_table
from pipelines.evaluation.report.confusion import confusions
from pipelines.evaluation.report.curves import training_curves
from pipelines.evaluation.report.maps import patch_maps
from pipelines.evaluation.report.tables import (
    ROW_NAMES,
    Table,
    compared_rows,
    lead_over_random,
    named_rows,
    number_tables,
    results_rows,
    table_of,
)
from pipelines.evaluation.subject import Subject


def write_report(
    results: dict[str, Any],
    subject: Subject,
    train: ProbeSet,
    test: ProbeSet,
    baseline: VisionTransformer,
    compared: Sequence[dict[str, Any]] = (),
    readouts: Readouts | None = None,
    beliefs: Study | None = None,
) -> str:
    """Draws everything and fills the template.

    Args:
        results: what `pipelines.evaluate.evaluate` puts into results.json.
        subject: the encoder.
        train: the labelled set that the probes learned from.
        test: the labelled set that they were scored on; its samples are shown.
        baseline: the randomly initialised encoder of the table.
        compared: results of other evaluations, to stand beside.
        readouts: the encoder's fitted probes, whose maps are drawn.
        beliefs: what the run's predictor expects; None without --decode-steps.

    Returns:
        The HTML.
    """
    shown = samples.shown_rows(test)
    decoded = decode_all(shown, subject.preprocessing, subject.sampler)
    rows = {name.capitalize(): row for name, row in named_rows(results).items()}
    beside = compared_rows(results, compared) if compared else None
    table, numbers = table_of(rows), number_tables(rows)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            results=results,
            table=table,
            meanings=_meanings(table.columns, results),
            has_classes=bool(scores(results["rows"]["encoder"])),
            numbers=numbers,
            number_meanings=_number_meanings(numbers, results),
            compared=table_of(beside) if beside else None,
            compared_numbers=number_tables(beside) if beside else {},
            notes=near_duplicate_notes(results["data"]),
            headline=[*_headline(results), *_number_headline(results)],
            sections=training_curves(subject.run_uri),
            neighbours=samples.neighbours(results, subject, train, test),
            blocks=block_table(results),
            block_charts=block_charts(results),
            confusions=confusions(results),
            beliefs=belief_section(beliefs) if beliefs else None,
            maps=patch_maps(subject, readouts or {}, decoded, results["classes"]),
            pca=samples.patch_colours(subject, baseline, decoded),
            masks=samples.masks(subject, shown),
            mask_note=samples.mask_note(subject.config),
            noun="clip" if subject.sampler else "image",
            counts=[len(part.labels_N) for part in (train, test)],
            provenance=_facts(results["provenance"]),
            config=to_json(subject.config) if subject.config else None,
        )
    )


def _meanings(shown: Sequence[Column], results: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a column's name and the sentence that explains it, with this job's settings."""
    known = {"settings": results["settings"], "row": results["rows"]["encoder"]}
    return [(column.name, column.meaning.format(**known)) for column in shown]


def _number_meanings(tables: Mapping[str, Table], results: dict[str, Any]) -> list[tuple[str, str]]:
    """Explains the columns that a table of any number shows, in order."""
    names = {column.name for table in tables.values() for column in table.columns}
    return _meanings([column for column in number_columns() if column.name in names], results)


def _number_headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of the encoder's R2 of each number and what it is."""
    numbers = results["rows"]["encoder"].get("numbers", {})
    known = {name: scores(row, NUMBER_PROBES)[:1] for name, row in numbers.items()}
    return [
        (f"{score:.3f}", f"{probe.columns[0].name} of {name}")
        for name, found in known.items()
        for probe, score in found
    ]


def _headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a number and what it is: first the main probe, then its lead over each baseline."""
    rows = results_rows(results)
    if not scores(rows["encoder"]):
        return []
    score = {name: 100 * main_score(row)[0] for name, row in rows.items()}
    return [
        (f"{score['encoder']:.1f}%", f"{main_column(rows['encoder']).name} of frozen features"),
        *(
            (f"{score['encoder'] - score[name]:+.1f}", f"points over {ROW_NAMES[name]}")
            for name in score
            if not name.startswith("encoder") and name != "random_init_block"
        ),
        *(
            [(f"{lead:+.1f}", "points over random init, both at their chosen blocks")]
            if (lead := lead_over_random(results, "_block")) is not None
            else []
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
