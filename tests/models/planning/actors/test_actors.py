"""Actors find the least cost, solve problems side by side alike, and keep to what is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.planning.actors.actor import METHODS, Actor, Search, best, coloured

TARGETS = torch.tensor([[0.8, -0.4], [-1.0, 0.2], [0.0, 0.5]])


def score(plans_BSHA: Tensor) -> Tensor:
    """The sum of the actions should be at a target of each problem."""
    return (plans_BSHA.sum(2) - TARGETS[: len(plans_BSHA), None]).norm(dim=-1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def limit(actions: Tensor) -> Tensor:
    return actions.clamp(-0.5, 0.5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_finds_the_least_cost_and_more_rounds_find_less(method: str) -> None:
    start = torch.zeros(3, 4, 2)
    found = {}
    for rounds in (1, 8):
        actor = Actor(method=method, search=Search(horizon=4, rounds=rounds), limit=limit)
        plans = actor.plan(score, start, seeded())
        assert plans.shape == start.shape
        assert plans.abs().max() <= 0.5
        found[rounds] = float(score(plans[:, None]).mean())
    assert found[8] < 0.25
    assert found[8] < found[1]
    assert found[1] < float(score(start[:, None]).mean())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_seed_fixes_the_plan(method: str) -> None:
    actor = Actor(method=method, search=Search(horizon=3, samples=20, elites=4), limit=limit)
    first, again, other = (
        actor.plan(score, torch.zeros(3, 3, 2), seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_best_come_first() -> None:
    plans = torch.arange(5.0).view(1, 5, 1, 1)
    cost = torch.tensor([[3.0, 1.0, 2.0, 9.0, 0.5]])
    assert best(plans, cost, 3).flatten().tolist() == [4.0, 1.0, 2.0]


@pytest.mark.parametrize("horizon", [7, 16])
def test_coloured_noise_has_variance_one_and_long_waves(horizon: int) -> None:
    noise = coloured(torch.zeros(1, horizon, 2), 20_000, 2.0, seeded())[0]
    assert noise.square().mean() == pytest.approx(1.0, abs=0.03)
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean()
    assert neighbours > 0.5  # of white noise it is 0
    white = coloured(torch.zeros(1, horizon, 2), 20_000, 0.0, seeded())[0]
    assert (white[:, 1:] * white[:, :-1]).mean() == pytest.approx(0, abs=0.02)


def test_impossible_searches_are_refused() -> None:
    with pytest.raises(ValueError, match="no more elites than samples"):
        Search(samples=5, elites=6)
