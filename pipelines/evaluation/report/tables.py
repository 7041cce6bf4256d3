"""Results as tables: the same columns and cells for the terminal, the report and a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import table as rich_table

from pipelines.evaluation.probes.probe import Column, Row
from pipelines.evaluation.probes.registry import (
    columns,
    main_column,
    main_score,
    number_columns,
    scores,
)
from pipelines.evaluation.report.comparison import name_of

ROW_NAMES = {
    "encoder": "encoder",
    "encoder_aligned": "encoder, shift aligned",
    "encoder_block": "encoder, chosen block",
    "random_init": "random init",
    "random_init_block": "random init, chosen block",
    "single_frame": "single frame",
    "raw_pixels": "raw pixels",
    "supervised": "supervised",
}
"""Names of the rows of results.json, and of the supervised baseline."""


@dataclass(frozen=True)
class Cell:
    """A number as text, and how it stands among the numbers of its column."""

    text: str | None
    """None where the row has no such number."""
    share: int | None
    """Per cent of the column's largest number; None where no number is better than another."""
    best: bool
    """Whether it is the column's best number."""


@dataclass(frozen=True)
class Table:
    """The columns that have a number, and the cells of every row by the row's name."""

    columns: list[Column]
    rows: dict[str, list[Cell]]


def table_of(rows: Mapping[str, Row], shown: Sequence[Column] | None = None) -> Table:
    """Builds the table of some rows of results.json.

    Args:
        rows: numbers by the name to show.
        shown: the columns that may appear; None for those of a whole row.
    """
    offered = columns() if shown is None else shown
    filled = [c for c in offered if any(c.number(row) is not None for row in rows.values())]
    by_column = [_cells(column, list(rows.values())) for column in filled]
    by_row = zip(*by_column, strict=True)
    return Table(filled, {name: list(cells) for name, cells in zip(rows, by_row, strict=True)})


def _cells(column: Column, rows: Sequence[Row]) -> list[Cell]:
    numbers = [column.number(row) for row in rows]
    known = [number for number in numbers if number is not None]
    most, best = max(known), min(known) if column.better == "lower" else max(known)
    return [
        Cell(
            text=column.cell(row),
            share=None
            if number is None or not column.better
            else round(100 * max(0, number) / (most if most > 0 else 1)),
            best=number is not None and column.better is not None and number == best,
        )
        for row, number in zip(rows, numbers, strict=True)
    ]


def results_rows(results: Mapping[str, Any]) -> dict[str, Row]:
    """Returns the rows of results.json; the supervised baseline joins them in the main column."""
    rows: dict[str, Row] = dict(results["rows"])
    if found := results.get("supervised"):
        knn = {"knn": found["accuracy"], "knn_shift": found["shift_accuracy"]}
        rows["supervised"] = {"attentive": found} if "attentive" in rows["encoder"] else knn
    return rows


def named_rows(results: Mapping[str, Any]) -> dict[str, Row]:
    """Returns the rows of results.json by the names to show."""
    return {ROW_NAMES[key]: row for key, row in results_rows(results).items()}


def number_tables(rows: Mapping[str, Row]) -> dict[str, Table]:
    """Builds a table for each number that rows of results.json hold, by the number's name."""
    names = dict.fromkeys(name for row in rows.values() for name in row.get("numbers", {}))
    return {
        name: table_of(
            {k: row["numbers"][name] for k, row in rows.items() if name in row.get("numbers", {})},
            number_columns(),
        )
        for name in names
    }


def compared_rows(
    results: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> dict[str, Row]:
    """Returns rows by name: this encoder, the others, then what each reads at its chosen block
    where it was evaluated so, and the baselines; equal names are numbered."""
    rows: dict[str, Row] = {}
    chosen: dict[str, Row] = {}
    for one in (results, *others):
        name = name_of(one)
        taken = sum(known == name or known.startswith(f"{name} (") for known in rows)
        name = f"{name} ({taken + 1})" if taken else name
        rows[name] = one["rows"]["encoder"]
        if "encoder_block" in one["rows"]:
            chosen[f"{name}, chosen block"] = one["rows"]["encoder_block"]
    baselines = {
        ROW_NAMES[key]: row for key, row in results["rows"].items() if not key.startswith("encoder")
    }
    return {**rows, **chosen, **baselines}


def results_tables(results: Mapping[str, Any]) -> list[rich_table.Table]:
    """Draws the results for a terminal: one table, and one more for each number."""
    rows = named_rows(results)
    drawn = [_draw(table, f"number {name}") for name, table in number_tables(rows).items()]
    return [_results_table(results, rows), *drawn]


def lead_over_random(results: Mapping[str, Any], ending: str = "") -> float | None:
    """Returns by how many points the encoder is above random init.

    Args:
        results: of an evaluation.
        ending: of the names of the two rows, `"_block"` for the chosen blocks.

    Returns:
        The difference of the main scores; None where there are no such rows or no classes.
    """
    ours, random = (results["rows"].get(row + ending) for row in ("encoder", "random_init"))
    if not ours or not scores(ours):
        return None
    return 100 * (main_score(ours)[0] - main_score(random)[0])


def _results_table(results: Mapping[str, Any], rows: Mapping[str, Row]) -> rich_table.Table:
    title = " ".join(str(results["provenance"].get(k, "")) for k in ("run", "checkpoint")).strip()
    drawn = _draw(table_of(rows), title or "evaluation")
    if (lead := lead_over_random(results)) is None:
        return drawn
    name = main_column(results["rows"]["encoder"]).name
    drawn.caption = f"accuracy in %; {name} is {lead:+.1f} points over random init"
    if (lead := lead_over_random(results, "_block")) is not None:
        drawn.caption += f", {lead:+.1f} with both at their chosen blocks"
    if task := results.get("task"):
        shares = f"{100 * task['single_frame']:.1f}, guessing {100 * task['chance']:.1f}"
        drawn.caption += f"; a task of {task['kind']} (best of one frame {shares})"
    return drawn


def comparison_tables(
    results: dict[str, Any], others: Sequence[dict[str, Any]]
) -> list[rich_table.Table]:
    """Draws several encoders for a terminal: one table, and one more for each number."""
    rows = compared_rows(results, others)
    drawn = [
        _draw(table, f"comparison, number {name}") for name, table in number_tables(rows).items()
    ]
    return [comparison_table(results, others), *drawn]


def comparison_table(results: dict[str, Any], others: Sequence[dict[str, Any]]) -> rich_table.Table:
    """Draws several encoders for a terminal, each with its lead over its own random weights."""
    rows = compared_rows(results, others)
    if not scores(results["rows"]["encoder"]):
        return _draw(table_of(rows), "comparison")
    leads = [lead_over_random(one) for one in (results, *others)]
    chosen = [lead_over_random(one, "_block") for one in (results, *others)]
    shown = [f"{lead:+.1f}" for lead in (*leads, *chosen) if lead is not None]
    extra = shown + ["-"] * (len(rows) - len(shown))
    title = "comparison; accuracies in %"
    return _draw(table_of(rows), title, second=("over random init", extra))


def _draw(
    table: Table, title: str, *, second: tuple[str, Sequence[str]] | None = None
) -> rich_table.Table:
    """Draws a table in characters that every terminal has.

    Args:
        table: what to draw.
        title: stands above it.
        second: heading and cells of one more column, to stand after the first.
    """
    drawn = rich_table.Table(title=title, title_justify="left")
    drawn.add_column("")
    names = [column.name for column in table.columns]
    for name in [*names[:1], *([second[0]] if second else []), *names[1:]]:
        drawn.add_column(name, justify="right", overflow="fold")
    for index, (name, cells) in enumerate(table.rows.items()):
        texts = ["-" if c.text is None else c.text.replace("\u00b1", "+-") for c in cells]
        more = [second[1][index]] if second else []
        drawn.add_row(name, *texts[:1], *more, *texts[1:])
    return drawn
