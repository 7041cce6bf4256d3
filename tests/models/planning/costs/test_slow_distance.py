"""The distance of slow features follows the way where the distance of latents has flattened."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.planning.costs.intrinsic import Future, goal_distance
from models.planning.costs.slow_distance import SlowDistance
from models.planning.worlds.two_rooms import SIDE, TwoRooms

WAVES = 4


def latents(places: Tensor) -> Tensor:
    """Cosines of whole numbers of half waves, all of variance 1: near is near, far is far."""
    numbers = torch.cartesian_prod(torch.arange(WAVES), torch.arange(WAVES))[1:]
    phases = math.pi * places[..., None, :] / SIDE * numbers
    waves = phases.cos().prod(-1)
    return waves * 2 ** (0.5 * (numbers > 0).sum(-1))


def walks() -> Tensor:
    world = TwoRooms(door=(0.0, 32.0))  # one room
    return world.random_walk(200, 16, torch.Generator().manual_seed(0))[0]


def future(places: Tensor, goals: Tensor) -> Future:
    states = latents(places)
    return Future(
        latents_EBTD=states[None, :, None],
        actions_BTA=torch.zeros(len(places), 1, 2),
        goals_BD=latents(goals),
    )


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


def test_it_follows_distance_where_that_of_the_latents_has_flattened() -> None:
    slow = SlowDistance.fit(latents(walks()))
    generator = torch.Generator().manual_seed(1)
    places, goals = (TwoRooms().sample_places(2000, generator) for _ in range(2))
    straight = (places - goals).norm(dim=-1)
    seen, far = future(places, goals), straight > 12
    assert correlation(goal_distance(seen)[far], straight[far]) < 0.4
    assert correlation(slow(seen)[far], straight[far]) > 0.8


def test_its_steps_are_as_long_as_those_of_the_latents() -> None:
    states = latents(walks())
    slow = SlowDistance.fit(states)
    before, after = states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)
    step = Future(
        latents_EBTD=after[None, :, None],
        actions_BTA=torch.zeros(len(after), 1, 2),
        goals_BD=before,
    )
    torch.testing.assert_close(
        slow(step).square().mean(), goal_distance(step).square().mean(), rtol=1e-3, atol=0
    )


def test_what_does_not_vary_is_no_feature() -> None:
    states = latents(walks())
    noise = 1e-4 * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    padded = SlowDistance.fit(torch.cat([states, noise], dim=-1))
    assert padded.features_DF.shape == (2 * (WAVES**2 - 1), WAVES**2 - 1)


def test_a_lag_finds_what_goes_far_behind_what_trembles() -> None:
    """The first goes far and trembles at every step; the second is smoother but soon comes back."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 60, 80, generator=generator)
    far = drawn[0].cumsum(1) / 4 + 0.6 * drawn[1]
    near = torch.zeros(60, 80)
    for step in range(1, 80):
        near[:, step] = 0.9 * near[:, step - 1] + 0.44 * drawn[2, :, step]
    seen = torch.stack([far, near], dim=-1)
    quick, slow = (
        SlowDistance.fit(seen, lag=lag, most=1).features_DF[:, 0].abs() for lag in (1, 20)
    )
    assert quick[1] > 3 * quick[0]
    assert slow[0] > 3 * slow[1]


def test_goals_are_read_off_what_their_picture_tells() -> None:
    """States hold the place twice; a goal's picture gives it once, beside nonsense."""
    places = walks()
    states = torch.cat([latents(places), latents(places)], dim=-1)
    width = states.shape[-1] // 2
    slow = SlowDistance.fit(states, told=width)
    whole = SlowDistance.fit(states)
    generator = torch.Generator().manual_seed(1)
    here, there = (TwoRooms().sample_places(500, generator) for _ in range(2))
    seen = torch.cat([latents(here), latents(here)], dim=-1)
    wanted = torch.cat([torch.randn(500, width, generator=generator), latents(there)], dim=-1)
    straight = (here - there).norm(dim=-1)
    assert correlation(slow.between(seen, wanted), straight) > 0.9
    assert correlation(whole.between(seen, wanted), straight) < 0.8  # the control


def test_walks_must_be_longer_than_the_lag() -> None:
    with pytest.raises(ValueError, match="over 16 steps need longer walks"):
        SlowDistance.fit(latents(walks())[:, :16], lag=16)
