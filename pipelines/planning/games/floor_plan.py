"""The floor plan of a scenario of Doom: where one can walk, the rooms, and the shortest ways.

It is read from the engine and only judges: it measures ways, draws tasks and drives the oracle. No
model and no agent sees it.

Shape suffixes: L lines, R and C rows and columns of cells, N cells where one can walk, S sectors.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from pipelines.fetchers.games.engine import require, start_doom

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
CELL = 8.0
"""Side of a cell, map units."""
CLEARANCE = 20.0
"""Least distance of the player's middle from a wall, map units; the player is 32 wide."""
ROOM_AREA = 20_000.0
"""Least area of a room, square map units; what is smaller is a corridor."""
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Steps to half of a cell's neighbours; the other half are the opposite steps."""


@dataclass(frozen=True, kw_only=True)
class FloorPlan:
    """Cells where the player can stand, in the order of rows and columns."""

    centres_N2: F64
    """x and y of their middles, map units."""
    sector_N: I64
    """The sector that each is in."""
    graph: csr_matrix
    """Lengths of the steps between neighbouring cells, map units."""
    apart_SS: I64
    """How many rooms away sectors are: rooms that are entered on the way. -1 where there is none,
    and where either is no room."""
    walls_L4: F64
    """x and y of both ends of the walls."""

    def cell(self, place: npt.ArrayLike) -> int:
        """Returns the number of the cell that is nearest to x and y."""
        distance_N = np.linalg.norm(self.centres_N2 - np.asarray(place, np.float64)[:2], axis=1)
        return int(distance_N.argmin())

    def room(self, place: npt.ArrayLike) -> int:
        """Returns the number of the room at x and y; -1 in a corridor."""
        sector = int(self.sector_N[self.cell(place)])
        return sector if self.apart_SS[sector, sector] == 0 else -1

    def ways(self, goal: npt.ArrayLike) -> F64:
        """Returns how long the way to x and y is from every cell, map units, [N]."""
        lengths_N: F64 = dijkstra(self.graph, directed=False, indices=self.cell(goal))
        return lengths_N

    def ahead(self, cell: int, ways_N: F64, steps: int) -> F64:
        """Returns the middle of the cell that lies some steps ahead on the shortest way, [2]."""
        for _ in range(steps):
            beside = self.graph[cell].indices
            nearer = int(beside[ways_N[beside].argmin()])
            if ways_N[nearer] >= ways_N[cell]:
                break
            cell = nearer
        place: F64 = self.centres_N2[cell]
        return place


def read_floor_plan(scenario: str) -> FloorPlan:
    """Reads the plan of a scenario from the engine.

    Raises:
        FetchError: the engine is not installed.
    """
    return floor_plan(doom_lines(scenario))


def doom_lines(scenario: str) -> list[F64]:
    """Returns the lines of every sector: x and y of both ends, and 1 for a wall, [L, 5]."""
    doom: Any = require("vizdoom")
    game = doom.DoomGame()
    game.load_config(str(Path(doom.scenarios_path) / f"{scenario}.cfg"))
    game.set_window_visible(False)
    game.set_sectors_info_enabled(True)
    with tempfile.TemporaryDirectory(prefix="rayjepa-doom-") as folder:
        start_doom(game, Path(folder))
        sectors = game.get_state().sectors
        game.close()
    return [
        np.array([(e.x1, e.y1, e.x2, e.y2, e.is_blocking) for e in sector.lines], np.float64)
        for sector in sectors
    ]


def floor_plan(sectors: list[F64]) -> FloorPlan:
    """Makes the plan of sectors, each given by its lines [L, 5]."""
    lines_L5 = np.concatenate(sectors)
    walls_L4 = np.unique(lines_L5[lines_L5[:, 4] > 0][:, :4], axis=0)
    ends_M2 = lines_L5[:, :4].reshape(-1, 2)
    x_C, y_R = (
        np.arange(low + CELL / 2, high, CELL)
        for low, high in zip(ends_M2.min(0), ends_M2.max(0), strict=True)
    )
    cells_RC2 = np.stack(np.meshgrid(x_C, y_R), axis=-1)
    sector_RC = np.full(cells_RC2.shape[:2], -1)
    for number, of_L5 in enumerate(sectors):
        sector_RC[_inside(cells_RC2, of_L5[:, :4])] = number
    areas_S = np.array([(sector_RC == s).sum() * CELL**2 for s in range(len(sectors))])
    free_RC = (sector_RC >= 0) & (_clearance(cells_RC2, walls_L4) >= CLEARANCE)
    number_RC = np.where(free_RC, free_RC.cumsum().reshape(free_RC.shape) - 1, -1)
    graph = _grid_graph(number_RC)
    sector_N = sector_RC[free_RC]
    return FloorPlan(
        centres_N2=cells_RC2[free_RC],
        sector_N=sector_N,
        graph=graph,
        apart_SS=_rooms_apart(graph, sector_N, areas_S >= ROOM_AREA),
        walls_L4=walls_L4,
    )


def _inside(points_RC2: F64, lines_L4: F64) -> npt.NDArray[np.bool_]:
    """Returns which points lie within the outline: a ray to the right crosses it oddly often."""
    x_RC, y_RC = points_RC2[..., 0], points_RC2[..., 1]
    inside_RC = np.zeros(x_RC.shape, bool)
    for x1, y1, x2, y2 in lines_L4:
        if y1 == y2:
            continue
        crossed_RC = (y1 > y_RC) != (y2 > y_RC)
        inside_RC ^= crossed_RC & (x_RC < x1 + (x2 - x1) * (y_RC - y1) / (y2 - y1))
    return inside_RC


def _clearance(points_RC2: F64, walls_L4: F64) -> F64:
    """Returns the distance of points from the nearest wall, [R, C]."""
    nearest_RC = np.full(points_RC2.shape[:2], np.inf)
    for wall in walls_L4:
        first, along = wall[:2], wall[2:] - wall[:2]
        share_RC = ((points_RC2 - first) @ along / (along @ along)).clip(0, 1)
        away_RC2 = points_RC2 - first - share_RC[..., None] * along
        nearest_RC = np.minimum(nearest_RC, np.linalg.norm(away_RC2, axis=-1))
    return nearest_RC


def _grid_graph(number_RC: I64) -> csr_matrix:
    """Joins cells that are beside one another, also at their corners."""
    R, C = number_RC.shape
    pairs, lengths = [], []
    for down, right in NEIGHBOURS:
        rows, other_rows = slice(0, R - down), slice(down, R)
        columns = slice(max(0, -right), C - max(0, right))
        other_columns = slice(max(0, right), C - max(0, -right))
        here, there = number_RC[rows, columns], number_RC[other_rows, other_columns]
        both = (here >= 0) & (there >= 0)
        pairs.append(np.stack([here[both], there[both]]))
        lengths.append(np.full(both.sum(), CELL * np.hypot(down, right)))
    (from_E, to_E), length_E = np.concatenate(pairs, axis=1), np.concatenate(lengths)
    count = int(number_RC.max()) + 1
    graph = csr_matrix((length_E, (from_E, to_E)), shape=(count, count))
    return (graph + graph.T).tocsr()


def _rooms_apart(graph: csr_matrix, sector_N: I64, room_S: npt.NDArray[np.bool_]) -> I64:
    """Counts the rooms that are entered on the way between rooms."""
    edges = graph.tocoo()
    here_E, there_E = sector_N[edges.row], sector_N[edges.col]
    S, door_E = len(room_S), here_E != there_E
    # Entering a corridor costs next to nothing, but zero would mean that there is no edge.
    cost_E = np.where(room_S[there_E[door_E]], 1.0, 1e-3)
    cost_SS = np.zeros((S, S))
    cost_SS[here_E[door_E], there_E[door_E]] = cost_E
    found_SS = dijkstra(csr_matrix(cost_SS))
    known_SS = np.isfinite(found_SS) & room_S[:, None] & room_S[None]
    return np.where(known_SS, np.where(known_SS, found_SS, 0).round(), -1).astype(np.int64)
