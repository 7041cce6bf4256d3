"""The floor plan knows where one can walk, how long the ways are, and how far rooms are apart."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.pipelines.fake_doom import plan, rectangle
from pipelines.planning.games.floor_plan import CLEARANCE, floor_plan

LEFT, MIDDLE, RIGHT = (80, 80), (304, 80), (528, 80)


def test_rooms_are_counted_by_those_that_are_entered_and_corridors_are_none() -> None:
    found = plan()
    left, middle, right = (found.room(place) for place in (LEFT, MIDDLE, RIGHT))
    assert len({left, middle, right}) == 3
    assert found.room((192, 80)) == -1
    apart = found.apart_SS
    assert apart[left, left] == 0
    assert apart[left, middle] == apart[middle, right] == apart[right, middle] == 1
    assert apart[left, right] == apart[right, left] == 2
    corridor = found.sector_N[found.cell((192, 80))]
    assert (apart[corridor] == -1).all()


def test_no_cell_is_in_or_near_a_wall() -> None:
    centres = plan().centres_N2
    in_room = np.any([(centres[:, 0] > a) & (centres[:, 0] < b)
                      for a, b in ((0, 160), (224, 384), (448, 608))], axis=0)  # fmt: skip
    assert ((centres[in_room, 1] >= CLEARANCE) & (centres[in_room, 1] <= 160 - CLEARANCE)).all()
    assert (np.abs(centres[~in_room, 1] - 80) <= 32 - CLEARANCE).all()
    assert in_room.sum() > 500
    assert (~in_room).sum() > 20


def test_ways_lead_around_walls() -> None:
    found = plan()
    ways = found.ways(RIGHT)
    assert ways[found.cell(RIGHT)] == 0
    assert ways[found.cell(LEFT)] == pytest.approx(448, abs=16)
    # Around the corner of the door: 136 along, and down and up again, in eighths of a turn.
    corner, beyond = (132, 132), (252, 132)
    way = found.ways(beyond)[found.cell(corner)]
    assert way > 1.2 * 120
    assert way == pytest.approx(120 + 2 * 48 * (2**0.5 - 1), abs=24)


def test_looking_ahead_goes_towards_the_goal_and_stops_there() -> None:
    found = plan()
    ways, cell = found.ways(RIGHT), found.cell(LEFT)
    lengths = [ways[found.cell(found.ahead(cell, ways, steps))] for steps in (0, 3, 6, 1000)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[1] >= 3 * 8
    assert lengths[-1] == 0


def test_where_no_way_leads_it_is_infinite() -> None:
    apart = floor_plan([rectangle(0, 160, 0, 160), rectangle(400, 560, 0, 160)])
    assert np.isinf(apart.ways((480, 80))[apart.cell((80, 80))])
    assert apart.apart_SS.tolist() == [[0, -1], [-1, 0]]
