"""Paired tasks, episodes, intervals and the gate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.planning.costs.intrinsic import depth
from models.planning.world_model.readout import Readout
from models.planning.worlds.two_rooms import TrueModel, TwoRooms
from pipelines.plan_episodes import PlanEpisodesConfig
from pipelines.planning.episodes import (
    CLEAR,
    LEAST_DISTANCE,
    PERIOD,
    SEEN,
    agent_policy,
    draw_tasks,
    map_policy,
    random_policy,
    run_episodes,
)
from pipelines.planning.imagination import disagreement, follows_the_way, open_loop
from pipelines.planning.results import gate, interval, share_of, summary

WORLD = TwoRooms()


def test_tasks_are_of_their_kind_and_do_not_depend_on_their_number() -> None:
    for kind, same in (("same", True), ("cross", False)):
        tasks, few = (draw_tasks(WORLD, kind, count, seed=3) for count in (60, 7))
        assert torch.equal(tasks.starts_B2[:7], few.starts_B2)
        assert torch.equal(tasks.goals_B2[:7], few.goals_B2)
        rooms = [WORLD.room(places) for places in (tasks.starts_B2, tasks.goals_B2)]
        assert len(rooms[0]) == 60
        assert ((rooms[0] == rooms[1]) == same).all()
        assert (tasks.starts_B2 - tasks.goals_B2).norm(dim=-1).min() >= LEAST_DISTANCE
    other = draw_tasks(WORLD, "same", 60, seed=4)
    assert not torch.equal(other.starts_B2, draw_tasks(WORLD, "same", 60, seed=3).starts_B2)


def test_episodes_end_on_arrival_and_parts_of_them_are_the_same() -> None:
    tasks = draw_tasks(WORLD, "cross", 40, seed=0)
    whole = run_episodes(WORLD, map_policy(WORLD, tasks), tasks, 50)
    assert whole.reached_B.all()
    assert whole.places_BT2.shape == (40, 51, 2)
    ends_B2 = whole.places_BT2[torch.arange(40), whole.steps_B]
    assert WORLD.reached(ends_B2, tasks.goals_B2).all()
    assert torch.equal(whole.places_BT2[:, -1], ends_B2)  # who has arrived stays
    before_B2 = whole.places_BT2[torch.arange(40), whole.steps_B - 1]
    assert not WORLD.reached(before_B2, tasks.goals_B2).any()
    part = tasks.part(slice(10, 20))
    again = run_episodes(WORLD, map_policy(WORLD, part), part, 50)
    assert torch.equal(again.places_BT2, whole.places_BT2[10:20])
    floor = run_episodes(WORLD, random_policy(WORLD, 0), tasks, 50)
    assert floor.reached_B.float().mean() < 0.1
    assert (floor.steps_B[~floor.reached_B] == 50).all()


def test_the_true_model_has_no_error_and_the_controls_do() -> None:
    class Seeing(TrueModel):
        """Reads the place off the frame, by the centre of the dot."""

        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            red = frames[:, 0].float()
            centres, total = torch.arange(32) + 0.5, red.sum((1, 2))
            return torch.stack([red.sum(1) @ centres, red.sum(2) @ centres], -1) / total[:, None]

    places = WORLD.sample_places(500, torch.Generator().manual_seed(0))
    readout = Readout.fit(places / 16 - 1, places)
    assert (readout(places / 16 - 1) - places).norm(dim=-1).mean() < 0.2
    exact = Readout(weight_D2=torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
    found = open_loop(Seeing(world=WORLD), exact, WORLD, seed=0)
    errors = found["open_loop_px"]
    assert found["probe_px"] < 0.2  # at the edge the dot is cut
    assert errors["model"]["20"] < 0.5
    assert errors["copy_last"]["5"] > 2
    assert errors["shuffled"]["5"] > 2
    assert found["effective_rank"] == pytest.approx(2, abs=0.1)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [
        low <= 0.7 <= high for low, high in (interval(rng.random(60) < 0.7) for _ in range(100))
    ]
    assert 0.86 < np.mean(covered) <= 0.99


def rows(**rates: tuple[float, float]) -> dict:
    drawn = np.arange(100) / 100
    reached = {
        row: {"same": drawn < same, "cross": drawn < cross} for row, (same, cross) in rates.items()
    }
    return summary(reached)


GOOD = {
    "random": (0.1, 0.0),
    "shuffled": (0.05, 0.0),
    "ours_plain": (0.6, 0.1),
    "ours": (0.8, 0.4),
    "ours_critic": (0.8, 0.7),
    "oracle_cem": (1.0, 0.7),
}


def test_the_gate_holds_for_a_good_model_and_every_condition_can_fail() -> None:
    found = rows(**GOOD)
    assert found["critic"]["cross"]["lift"] == pytest.approx(0.3)
    assert found["critic"]["cross"]["interval"][0] > 0.2
    assert found["slow_features"]["same"]["lift"] == pytest.approx(0.2)
    assert all(gate(found["rows"], 0.7).values())
    for changed, error in (
        ({"ours": (0.5, 0.4)}, 0.7),
        ({"random": (0.3, 0.0), "shuffled": (0.3, 0.0)}, 0.7),
        ({"ours": (0.8, 0.3)}, 0.7),
        ({"ours_critic": (0.8, 0.3)}, 0.7),
        ({"shuffled": (0.5, 0.0)}, 0.7),
        ({}, 1.6),
        ({"control": (0.7, 0.0)}, 0.7),
    ):
        held = gate(rows(**GOOD | changed)["rows"], error)
        assert sum(not value for value in held.values()) == 1, (changed, held)


def test_impossible_jobs_are_refused() -> None:
    with pytest.raises(ValueError, match="--episodes: must be 1 to"):
        PlanEpisodesConfig(checkpoint="runs/x", episodes=0)
    with pytest.raises(ValueError, match="--budget: needs at least 96"):
        PlanEpisodesConfig(checkpoint="runs/x", budget=10)


def test_a_share_of_another_rows_success_has_a_paired_interval() -> None:
    whole = np.arange(100) < 80
    found = share_of(whole & (np.arange(100) % 4 > 0), whole)
    assert found["share"] == pytest.approx(0.75)
    low, high = found["interval"]
    assert 0.6 < low < 0.75 < high < 0.9
    assert share_of(whole, whole)["interval"] == (1.0, 1.0)  # pairs vary together


def test_harder_episodes_hide_frames_and_lie_behind_zones() -> None:
    hidden, across = (draw_tasks(WORLD, kind, 30, seed=3) for kind in ("hidden", "cross"))
    assert hidden.hides
    assert torch.equal(hidden.starts_B2, across.starts_B2)
    tasks = draw_tasks(WORLD, "zone", 30, seed=3)
    assert (WORLD.room(tasks.starts_B2) == WORLD.room(tasks.goals_B2)).all()
    straight = run_episodes(WORLD, map_policy(WORLD, tasks), tasks, 50)
    assert straight.reached_B.all()  # the map's way goes straight through
    assert straight.entered_B.all()
    assert not straight.succeeded_B.any()
    ends = torch.cat([tasks.starts_B2, tasks.goals_B2])
    assert (depth(ends, tasks.zones) <= -CLEAR).all()


def test_hidden_frames_are_black_and_told() -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching:
        def begin(self, goals: torch.Tensor) -> None:
            assert goals.any()

        def plan(self, frames, rows, hidden=None):
            seen.append((not frames.any(), hidden is not None and bool(hidden.all())))
            return torch.zeros(len(rows), 1, 2)

    tasks = draw_tasks(WORLD, "hidden", 3, seed=0)
    run_episodes(WORLD, agent_policy(Watching(), WORLD.render, tasks), tasks, 2 * PERIOD)
    expected = ([False] * SEEN + [True] * (PERIOD - SEEN)) * 2
    assert seen == [(one, one) for one in expected]


def test_the_true_distance_follows_the_way_and_noise_does_not() -> None:
    class Seeing(TrueModel):
        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            red = frames[:, 0].float()
            centres, total = torch.arange(32) + 0.5, red.sum((1, 2))
            return torch.stack([red.sum(1) @ centres, red.sum(2) @ centres], -1) / total[:, None]

    door = torch.tensor([16.0, 16.0])

    def through_the_door(here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        around = (here - door).norm(dim=-1) + (there - door).norm(dim=-1)
        apart = WORLD.room(here) != WORLD.room(there)
        return torch.where(apart, around, (here - there).norm(dim=-1))

    found = follows_the_way(
        Seeing(world=WORLD),
        {
            "way": through_the_door,
            "straight": lambda here, there: (here - there).norm(dim=-1),
            "nothing": lambda here, there: here.sum(-1) % 1,
        },
        WORLD,
        seed=0,
    )
    assert found["way"]["all"] > 0.99
    assert 0.8 < found["straight"]["all"] < 0.97
    assert found["straight"]["far"] < found["straight"]["all"]
    assert abs(found["nothing"]["all"]) < 0.1


def test_predictors_that_part_where_they_err_tell_great_errors_from_small_ones() -> None:
    class Parting(TrueModel):
        """Errs by what the start is numbered by, and its predictors are that far apart."""

        knows: bool = True

        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            red = frames[:, 0].float()
            centres, total = torch.arange(32) + 0.5, red.sum((1, 2))
            return torch.stack([red.sum(1) @ centres, red.sum(2) @ centres], -1) / total[:, None]

        def rollout(self, places: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
            true = WORLD.rollout(places, actions)
            wrong = torch.linspace(0, 5, len(places))[:, None, None]
            apart = wrong if self.knows else wrong.flip(0)
            return torch.stack([true + wrong + apart, true + wrong - apart])

    class Deluded(Parting):
        knows = False

    class Single(Parting):
        def rollout(self, places: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
            return super().rollout(places, actions)[:1]

    found, deluded = (disagreement(of(world=WORLD), WORLD, 0)["5"] for of in (Parting, Deluded))
    assert found["disagreement"] > 0.99
    assert deluded["disagreement"] < 0.01
    assert disagreement(Single(world=WORLD), WORLD, 0) == {}
