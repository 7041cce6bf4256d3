"""Draws trajectories: where episodes went, and what their first plan imagined."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from models.planning.worlds.two_rooms import SIDE, TwoRooms
from pipelines.planning.episodes import Episodes, Tasks

DRAWN = 6
"""Episodes that are drawn of each panel."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of the two rooms."""

    title: str
    tasks: Tasks
    episodes: Episodes
    imagined: Sequence[Sequence[Sequence[float]]]
    """Places that the first plan of an episode was expected to lead to, by episode; may be
    empty."""


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
