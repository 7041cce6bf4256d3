"""The distance of slow features follows the way where the distance of latents has flattened."""

from __future__ import annotations

import math

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
