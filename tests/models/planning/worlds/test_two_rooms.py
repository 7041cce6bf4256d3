"""Two-Rooms: walls stop, the door lets through, and the map's owner always arrives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.planning.worlds.two_rooms import SIDE, TwoRooms

WORLD = TwoRooms()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_step(place: tuple[float, float], action: tuple[float, float]) -> tuple[float, float]:
    """The rules in scalars: shorten, stay in the picture, stop at the wall unless in the door."""
    x, y = place
    length = math.hypot(*action)
    scale = min(1.0, 1.5 / length) if length else 1.0
    new_x = min(max(x + action[0] * scale, 1.0), 31.0)
    new_y = min(max(y + action[1] * scale, 1.0), 31.0)
    if 15 < new_x < 17 and not 14 <= y <= 18:
        new_x = 15.0 if x <= 15 else 17.0
    if 15 < new_x < 17:
        new_y = min(max(new_y, 14.0), 18.0)
    return new_x, new_y


def test_a_step_follows_the_rules_of_the_scalar_world() -> None:
    generator = seeded()
    places_B2 = WORLD.sample_places(3000, generator)
    places_B2[:1000, 0] = 14 + 4 * torch.rand(1000, generator=generator)  # around the wall
    in_wall_B = WORLD.room(places_B2) == -1
    places_B2[in_wall_B, 1] = places_B2[in_wall_B, 1].clamp(14, 18)
    actions_B2 = 3 * torch.randn(3000, 2, generator=generator)
    expected = [
        naive_step(tuple(place), tuple(action))
        for place, action in zip(places_B2.tolist(), actions_B2.tolist(), strict=True)
    ]
    torch.testing.assert_close(WORLD.step(places_B2, actions_B2), torch.tensor(expected))


def test_no_walk_passes_the_wall_outside_the_door() -> None:
    places_BT2, actions_BT2 = WORLD.random_walk(400, 60, seeded(1))
    assert places_BT2.min() >= 1
    assert places_BT2.max() <= SIDE - 1
    assert actions_BT2.norm(dim=-1).max() <= 1.5 + 1e-5
    x_BT, y_BT = places_BT2.unbind(-1)
    within = (x_BT > 15) & (x_BT < 17)
    assert within.any()
    assert ((y_BT[within] >= 14) & (y_BT[within] <= 18)).all()
    rooms_BT = WORLD.room(places_BT2)
    assert (
        not ((rooms_BT[:, 1:] - rooms_BT[:, :-1]).abs() == 1)
        .logical_and((rooms_BT[:, 1:] >= 0) & (rooms_BT[:, :-1] >= 0))
        .any()
    )  # never from one room straight into the other
    assert (rooms_BT == 0).float().mean() == pytest.approx(0.5, abs=0.1)


def centre_of_dot(pixels_B3HW: Tensor) -> Tensor:
    red_BHW = pixels_B3HW[:, 0].float()
    centres = torch.arange(SIDE) + 0.5
    total_B = red_BHW.sum((1, 2))
    return torch.stack(
        [(red_BHW.sum(1) @ centres) / total_B, (red_BHW.sum(2) @ centres) / total_B], dim=-1
    )


def test_the_picture_shows_the_place_and_the_wall() -> None:
    places_B2 = WORLD.sample_places(200, seeded(2)).clamp(4, SIDE - 4)
    pixels = WORLD.render(places_B2)
    assert pixels.shape == (200, 3, SIDE, SIDE)
    assert (centre_of_dot(pixels) - places_B2).abs().max() < 0.05
    empty = WORLD.render(torch.full((1, 2), 99.0))[0, 2]
    assert empty[:, 15:17].eq(255).sum() == 2 * (SIDE - 4)
    assert empty[14:18, 15:17].eq(0).all()
    assert empty.sum() == 255 * 2 * (SIDE - 4)


def test_who_knows_the_map_arrives_and_who_goes_straight_does_not() -> None:
    starts_B2, goals_B2 = (WORLD.sample_places(500, seeded(seed)) for seed in (3, 4))
    arrived = {}
    for name in ("map", "straight"):
        places_B2, found_B = starts_B2, WORLD.reached(starts_B2, goals_B2)
        for _ in range(50):
            ways = goals_B2 - places_B2
            actions = WORLD.way_out(places_B2, goals_B2) if name == "map" else ways
            places_B2 = WORLD.step(places_B2, actions)
            found_B |= WORLD.reached(places_B2, goals_B2)
        arrived[name] = found_B
    assert arrived["map"].all()
    across_B = WORLD.room(starts_B2) != WORLD.room(goals_B2)
    assert arrived["straight"][~across_B].all()
    assert arrived["straight"][across_B].float().mean() < 0.5


def test_a_seed_fixes_a_walk() -> None:
    first, again, other = (WORLD.random_walk(3, 5, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(WORLD.rollout(first[0][:, 0], first[1]), first[0][:, 1:])


def test_the_way_leads_through_the_door_and_the_map_walks_it() -> None:
    world = TwoRooms()
    here, there = (world.sample_places(200, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    way, straight = world.way_length(here, there), (here - there).norm(dim=-1)
    same = world.room(here) == world.room(there)
    assert torch.equal(way[same], straight[same])
    assert (way[~same] >= straight[~same]).all()
    assert (way[~same] > straight[~same] + 3).any()
    assert torch.allclose(way, world.way_length(there, here))
    places, taken = here, torch.zeros(len(here))
    for _ in range(60):
        far = ~world.reached(places, there)
        step = world.step(places, world.way_out(places, there))
        taken += torch.where(far, (step - places).norm(dim=-1), 0.0)
        places = torch.where(far[:, None], step, places)
    assert ((taken - way).abs() < 4).all()  # the map goes to the door's edge, and stops at 2 pixels
