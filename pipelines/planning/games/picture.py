"""Draws where episodes went on the floor plan, and success by budget."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.planning.games.floor_plan import FloorPlan
from pipelines.planning.games.navigation import Episode, Task

DRAWN = 6
"""Episodes that are drawn of each panel."""


def draw_paths(
    plan: FloorPlan, panels: Sequence[tuple[str, Sequence[Task], Sequence[Episode]]]
) -> bytes:
    """Returns a PNG of the panels, two in a row: title, tasks and episodes of each."""
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 4.6 * lines), layout="constrained")
    for place, (title, tasks, episodes) in enumerate(panels):
        axes = figure.add_subplot(lines, 2, place + 1)
        for x1, y1, x2, y2 in plan.walls_L4:
            axes.plot([x1, x2], [y1, y2], color="0.4", linewidth=1)
        for number, (task, episode) in enumerate(zip(tasks[:DRAWN], episodes, strict=False)):
            _draw_path(axes, task, episode, f"C{number}")
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=9)
    return _png(figure)


def _draw_path(axes: Axes, task: Task, episode: Episode, colour: str) -> None:
    path_TP = episode.path_TP
    axes.plot(path_TP[:, 0], path_TP[:, 1], color=colour, linewidth=1.2)
    axes.plot(*path_TP[0, :2], "o", color=colour, markersize=5)
    axes.plot(*task.goal_P[:2], "*", color=colour, markersize=10, markeredgecolor="black")


def draw_curve(
    curve: Sequence[Mapping[str, Any]], floors: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """Returns a PNG of success by imagined steps an action, with 95% intervals.

    Args:
        curve: for every budget `budget`, `plans_per_second` and `rows`, by kind of task.
        floors: rates of the random policy and of the oracle by kind, drawn as lines.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, kind in enumerate(curve[0]["rows"]):
        of = [point["rows"][kind] for point in curve]
        rates = [100 * row["rate"] for row in of]
        below = [rate - 100 * row["interval"][0] for rate, row in zip(rates, of, strict=True)]
        above = [100 * row["interval"][1] - rate for rate, row in zip(rates, of, strict=True)]
        axes.errorbar(
            [point["budget"] for point in curve],
            rates,
            yerr=[below, above],
            color=f"C{number}",
            marker="o",
            capsize=3,
            label=f"{kind}",
        )
        axes.axhline(100 * floors["random"][kind]["rate"], color=f"C{number}", linestyle=":")
    axes.set(xscale="log", ylim=(-3, 103), xlabel="imagined steps an action", ylabel="reached, %")
    for point in curve:
        axes.annotate(
            f"{point['plans_per_second']:,.0f}",
            (point["budget"], 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    axes.set_title("above: plans a second on one core", fontsize=8, pad=14)
    axes.legend(title="goal in rooms away; dotted: random", fontsize=8, title_fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
