"""Draws trajectories, with what the first plan imagined, and success by budget."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from models.planning.worlds.two_rooms import SIDE, TwoRooms
from pipelines.planning.episodes import Episodes, Tasks
from pipelines.planning.rows import WORLD, Comparison

DRAWN = 6
"""Episodes that are drawn of each panel."""
DRAWN_ROWS = ("random", "ours", "ours_critic", "oracle_cem")
"""The rows that are drawn."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of the two rooms."""

    title: str
    tasks: Tasks
    episodes: Episodes
    imagined: Sequence[Sequence[Sequence[float]]]
    """Places that the first plan of an episode was expected to lead to, by episode; may be
    empty."""


def draw_episodes(
    parts: Comparison,
    tasks: Mapping[str, Tasks],
    played: Mapping[str, Mapping[str, tuple[Episodes, float]]],
) -> bytes:
    """Returns a PNG of episodes of `DRAWN_ROWS`, with what the model imagined of first plans."""
    panels, model = [], parts.trained.model
    for kind in tasks:
        for row in DRAWN_ROWS:
            episodes, imagined = played[row][kind][0], list[Any]()
            if row.startswith("ours"):
                with torch.no_grad():
                    starts_BD = model.encode(WORLD.render(tasks[kind].starts_B2))
                    latents = model.rollout(starts_BD, episodes.first_plans_BH2).mean(0)
                    imagined = parts.trained.readout(latents).tolist()
            rate = float(episodes.reached_B.float().mean())
            title = f"{row}, {kind} room: {rate:.0%}"
            panels.append(
                Panel(title=title, tasks=tasks[kind], episodes=episodes, imagined=imagined)
            )
    return draw(panels, WORLD)


def draw(panels: Sequence[Panel], world: TwoRooms) -> bytes:
    """Returns a PNG of the panels side by side, at most four in a row."""
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * lines), layout="constrained")
    for place, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(lines, columns, place + 1), panel, world)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_panel(axes: Axes, panel: Panel, world: TwoRooms) -> None:
    (left, right), (top, bottom) = world.wall, world.door
    for low, high in ((0.0, top), (bottom, float(SIDE))):
        axes.add_patch(Rectangle((left, low), right - left, high - low, color="0.75"))
    for number in range(min(DRAWN, len(panel.tasks.starts_B2))):
        path_T2 = panel.episodes.places_BT2[number].numpy()
        goal_2 = panel.tasks.goals_B2[number].tolist()
        colour = f"C{number}"
        axes.plot(path_T2[:, 0], path_T2[:, 1], color=colour, linewidth=1.2)
        axes.plot(*path_T2[0], "o", color=colour, markersize=5)
        axes.plot(*goal_2, "*", color=colour, markersize=10, markeredgecolor="black")
        if number < len(panel.imagined):
            x, y = zip(*panel.imagined[number], strict=True)
            axes.plot(x, y, ":", color=colour, linewidth=1)
    axes.set(xlim=(0, SIDE), ylim=(SIDE, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title(panel.title, fontsize=9)


def draw_budgets(curves: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]) -> bytes:
    """Returns a PNG of success by imagined steps an action, with intervals.

    On top stand the decisions a second of the first row.

    Args:
        curves: by row and budget, what `pipelines.planning.results.rates` says of each kind, and
            `decisions_per_second`.
        kinds: the kinds and their titles, one panel each.
    """
    figure = Figure(figsize=(4.6 * len(kinds), 3.4), layout="constrained")
    for place, (kind, title) in enumerate(kinds.items()):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        for row, points in curves.items():
            of = [point[kind] for point in points.values()]
            steps = [int(budget) for budget in points]
            axes.plot(steps, [one["rate"] for one in of], "o-", label=row, markersize=4)
            low, high = zip(*(one["interval"] for one in of), strict=True)
            axes.fill_between(steps, low, high, alpha=0.15)
        axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="imagined steps an action")
        axes.set_title(title, pad=16)
        axes.grid(alpha=0.3)
        for budget, point in next(iter(curves.values())).items():
            axes.annotate(
                f"{point['decisions_per_second']:.0f}/s",
                (int(budget), 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7,
            )
    figure.axes[0].set_ylabel("goals reached")
    figure.axes[-1].legend(loc="lower right", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
