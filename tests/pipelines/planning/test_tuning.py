"""Candidates fit the budget, begin with what there is, and the better one is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs.critic import Critic
from models.planning.costs.intrinsic import goal_distance
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.planning.episodes import draw_tasks
from pipelines.planning.playing import Player
from pipelines.planning.rows import Comparison, Fitted
from pipelines.planning.studies.studies import HELD_OUT, TAUGHT
from pipelines.planning.tuning import VALIDATION, Candidate, draw_candidates, gain, judge

WORLD = TwoRooms()


class Seeing:
    """Knows the world: latents are the places that the frames show."""

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        red = frames[:, 0].float()
        centres, total = torch.arange(32) + 0.5, red.sum((1, 2))
        return torch.stack([red.sum(1) @ centres, red.sum(2) @ centres], -1) / total[:, None]

    def rollout(self, places: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return WORLD.rollout(places, actions)[None]


class Straight(Critic):
    """Says the distance."""

    def forward(self, latents: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        return (latents - goals).norm(dim=-1)


def test_candidates_fit_the_budget_and_begin_with_what_there_is() -> None:
    task, rules = TaskSpec(budget=300), Rules()
    drawn = draw_candidates(task, rules, 12, seed=3)
    assert drawn == draw_candidates(task, rules, 12, seed=3)
    assert drawn != draw_candidates(task, rules, 12, seed=4)
    assert drawn[0] == Candidate(method="cem", rules=rules)
    assert len({(c.method, c.rules) for c in drawn}) == 12
    for candidate in drawn:
        configure(task, candidate.rules)  # raises where the budget does not do


PARTS = Comparison(
    trained=Fitted(model=Seeing(), critic=Straight(2), distance=goal_distance, readout=lambda z: z),
    settings={},
    untrained=Seeing(),
    control=None,
    task=TaskSpec(budget=480, steps=30),
    rules=Rules(),
    seed=0,
)


def test_a_horizon_that_sees_no_door_is_judged_worse() -> None:
    tasks = [draw_tasks(WORLD, "cross", count, VALIDATION) for count in (8, 4)]
    far, near = (
        judge(PARTS, Candidate(method="cem", rules=Rules(horizon=steps)), tasks)
        for steps in (16, 1)
    )
    assert far.success > near.success
    assert far.steps < near.steps <= 30


def test_what_a_search_gains_is_paired_and_told_of_success_and_steps() -> None:
    def in_turn(parts: Comparison, work: Callable, items: Sequence) -> Iterator[tuple[int, Any]]:
        yield from enumerate(work(parts, item) for item in items)

    player = Player(chunk=8, each=in_turn)
    tasks = {"cross": draw_tasks(WORLD, "cross", 12, 0)}
    near = dataclasses.replace(PARTS, rules=Rules(horizon=1))
    found = gain(near, PARTS, tasks, player)["cross"]
    back = gain(PARTS, near, tasks, player)["cross"]
    for name in ("success", "fewer_steps"):
        assert found[name]["lift"] > 0
        assert found[name]["interval"][0] <= found[name]["lift"] <= found[name]["interval"][1]
        assert back[name]["lift"] == -found[name]["lift"]
    none = gain(PARTS, PARTS, tasks, player)["cross"]
    assert none["fewer_steps"] == {"lift": 0.0, "interval": (0.0, 0.0)}


def test_validation_episodes_are_not_those_that_are_reported() -> None:
    places = torch.cat(
        [
            draw_tasks(WORLD, "cross", 20, base + seed).starts_B2
            for base in (HELD_OUT, VALIDATION, TAUGHT)
            for seed in (0, 1, 2)
        ]
    )
    assert len(places.unique(dim=0)) == len(places) == 180
