"""How well each block of an encoder was read on held-out training samples: a table and charts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from rich import table as rich_table

from pipelines.evaluation.report.figures import Curve, chart

NAMES = {"encoder": "encoder", "random_init": "random init"}
"""The encoders that choose, by their rows of results.json; the others stand beside the first."""


@dataclass(frozen=True)
class BlockCell:
    """The score of a block as text."""

    text: str
    chosen: bool
    """Whether its encoder chose this block."""


@dataclass(frozen=True)
class BlockTable:
    """Scores of all blocks."""

    columns: list[str]
    rows: list[list[BlockCell]]
    """The cells of every block, first block first."""


def block_table(results: Mapping[str, Any]) -> BlockTable | None:
    """Builds the table of held-out scores; None for an evaluation of the last block alone."""
    if "blocks" not in results:
        return None
    names, columns = [], []
    for what, by_row in _readings(results["blocks"]).items():
        for row, values in by_row.items():
            names.append(f"{what}, {NAMES[row]}")
            chosen = results["blocks"]["rows"][row]["chosen"]
            columns.append(
                [BlockCell(_text(what, v), block == chosen) for block, v in enumerate(values, 1)]
            )
    return BlockTable(names, [list(cells) for cells in zip(*columns, strict=True)])


def block_charts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draws every column's scores by block, the encoder's and random init's over one another.

    Returns:
        Title and SVG of each chart.
    """
    if "blocks" not in results:
        return []
    charts = []
    for what, by_row in _readings(results["blocks"]).items():
        curves = []
        for row, values in by_row.items():
            points = [(float(block), v) for block, v in enumerate(values, 1) if v is not None]
            chosen = results["blocks"]["rows"][row]["chosen"]
            dots = [point for point in points if point[0] == chosen]
            if dots:
                curves.append(Curve(points, dots[0], beside=row != "encoder"))
        if curves:
            charts.append({"title": what, "chart": Markup(chart(curves, f"{what} by block"))})
    return charts


def draw_blocks(table: BlockTable) -> rich_table.Table:
    """Draws the table for a terminal."""
    drawn = rich_table.Table(
        title="blocks, on held-out training samples",
        title_justify="left",
        caption="* the block that was chosen",
    )
    drawn.add_column("block", justify="right")
    for name in table.columns:
        drawn.add_column(name, justify="right", overflow="fold")
    for block, cells in enumerate(table.rows, 1):
        drawn.add_row(str(block), *(f"{'*' if c.chosen else ''}{c.text}" for c in cells))
    return drawn


def _readings(blocks: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """Returns the scores of all blocks by what is read and by row; accuracies in per cent."""
    rows = {row: blocks["rows"][row] for row in NAMES}
    found: dict[str, dict[str, list[float | None]]] = {}
    if rows["encoder"]["accuracy"] is not None:
        found["Accuracy"] = {r: [100 * v for v in one["accuracy"]] for r, one in rows.items()}
    for name in rows["encoder"]["numbers"]:
        found[f"R2 of {name}"] = {r: one["numbers"][name] for r, one in rows.items()}
    if len(found) > 1:
        found["Mean score"] = {r: one["score"] for r, one in rows.items()}
    return found


def _text(what: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if what == "Accuracy" else f"{value:.3f}"
