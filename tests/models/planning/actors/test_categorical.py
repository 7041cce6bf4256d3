"""The categorical actor finds the best presses, proposes nothing else, and starts from its plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from models.planning.actors.actor import Search
from models.planning.actors.categorical import CategoricalActor

BUTTONS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
WANTED = torch.tensor([[0, 0, 2, 3, 1], [3, 3, 3, 1, 1]])
SEARCH = Search(horizon=5, samples=100, elites=10, rounds=6)


def score(plans_BSHA: Tensor) -> Tensor:
    """Buttons that are pressed otherwise than each problem wants."""
    wanted_BHA = BUTTONS[WANTED[: len(plans_BSHA)]]
    return (plans_BSHA - wanted_BHA[:, None]).abs().sum((2, 3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_finds_the_best_of_all_plans_of_each_problem() -> None:
    every = torch.tensor(list(itertools.product(range(4), repeat=5)))
    costs = score(BUTTONS[every].expand(2, -1, -1, -1))
    best = BUTTONS[every[costs.argmin(1)]]
    found = CategoricalActor(choices_KA=BUTTONS, search=SEARCH).plan(
        score, torch.zeros(2, 5, 3), seeded()
    )
    assert torch.equal(found, best)


def test_one_round_finds_less_and_a_search_of_the_highest_cost_the_worst() -> None:
    one = Search(horizon=5, samples=20, elites=4, rounds=1)
    start = torch.zeros(2, 5, 3)
    few = CategoricalActor(choices_KA=BUTTONS, search=one).plan(score, start, seeded())
    many = CategoricalActor(choices_KA=BUTTONS, search=SEARCH)
    worst = many.plan(lambda plans: -score(plans), start, seeded())
    cost = [
        float(score(p[:, None]).mean()) for p in (many.plan(score, start, seeded()), few, worst)
    ]
    assert cost[0] < cost[1] < cost[2]


def test_only_choices_are_proposed() -> None:
    proposed = []

    def recorded(plans_BSHA: Tensor) -> Tensor:
        proposed.append(plans_BSHA)
        return score(plans_BSHA)

    actor = CategoricalActor(choices_KA=BUTTONS, search=SEARCH)
    found = actor.plan(recorded, torch.full((2, 5, 3), 7.0), seeded())
    rows = torch.cat([found.reshape(-1, 3), *(p.reshape(-1, 3) for p in proposed)])
    assert (rows[:, None] == BUTTONS).all(-1).any(-1).all()
    assert proposed[0].shape == (2, 100, 5, 3)


def test_it_never_does_worse_than_the_plan_that_it_starts_from() -> None:
    little = Search(horizon=5, samples=2, elites=1, rounds=2)
    actor = CategoricalActor(choices_KA=BUTTONS, search=little)
    start = BUTTONS[WANTED]
    assert torch.equal(actor.plan(score, start, seeded()), start)
    # Steps of no choice say nothing: what is found there comes from the samples.
    start[:, -1] = 0
    kept = actor.plan(score, start, seeded())
    assert torch.equal(kept[:, :-1], start[:, :-1])
    assert not torch.equal(actor.plan(score, torch.zeros(2, 5, 3), seeded()), BUTTONS[WANTED])


def test_samples_hold_their_choices() -> None:
    chance = torch.full((1, 30, 4), 0.25)
    repeats = {}
    for hold in (0.0, 0.8):
        actor = CategoricalActor(choices_KA=BUTTONS, search=SEARCH, hold=hold)
        plans = actor.sampled(chance, 500, seeded())
        repeats[hold] = float((plans[..., 1:] == plans[..., :-1]).float().mean())
    assert repeats[0.0] == pytest.approx(0.25, abs=0.02)
    assert repeats[0.8] == pytest.approx(0.8 + 0.2 * 0.25, abs=0.02)


def test_a_seed_fixes_the_plan() -> None:
    small = Search(horizon=5, samples=4, elites=1, rounds=1)
    actor = CategoricalActor(choices_KA=BUTTONS, search=small)
    first, again, other = (
        actor.plan(score, torch.zeros(2, 5, 3), seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("settings", [{"hold": 1.0}, {"least_chance": 0.25}, {"hold": -0.1}])
def test_impossible_chances_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a least chance below 1/4"):
        CategoricalActor(choices_KA=BUTTONS, **settings)
