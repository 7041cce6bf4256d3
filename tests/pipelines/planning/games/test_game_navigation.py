"""Tasks are paired and as far away as they say; the oracle arrives, and chance mostly does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.pipelines.fake_doom import fake_world, plan
from models.planning.actors.actor import Search
from models.planning.actors.categorical import CategoricalActor
from models.planning.agent import Agent
from models.planning.costs.intrinsic import IntrinsicCost
from pipelines.planning.games.navigation import (
    KINDS,
    REACHED,
    Task,
    agent_policy,
    draw_tasks,
    map_policy,
    random_policy,
    run_episode,
)
from pipelines.planning.games.walks import Walk, walk
from pipelines.planning.games.worlds import Player

STEPS = 60


@pytest.fixture(scope="module")
def player() -> Player:
    return fake_world().start()


@pytest.fixture(scope="module")
def tasks(player: Player) -> dict[str, list[Task]]:
    walks = [walk(player, seed) for seed in range(20)]
    return {kind: draw_tasks(player, plan(), walks, kind, 8, seed=1) for kind in KINDS}


@pytest.mark.parametrize("kind", list(KINDS))
def test_goals_are_so_many_rooms_away(
    kind: str, player: Player, tasks: dict[str, list[Task]]
) -> None:
    found = plan()
    for task in tasks[kind]:
        rooms = found.room(task.start_P), found.room(task.goal_P)
        assert found.apart_SS[rooms] == KINDS[kind]
        assert found.ways(task.goal_P)[found.cell(task.start_P)] > REACHED
        player.reset(task.seed)
        np.testing.assert_array_equal(player.places(), task.start_P)
    walks = [walk(player, seed) for seed in range(20)]
    fewer = draw_tasks(player, found, walks, kind, 3, seed=1)
    assert [task.seed for task in fewer] == [task.seed for task in tasks[kind][:3]]


def test_walks_that_show_no_such_goal_are_refused(player: Player) -> None:
    seen = walk(player, 0, 5)
    corridor = np.tile(np.float32([192, 80, 0, 1]), (5, 1))
    nowhere = Walk(frames_THW3=seen.frames_THW3, actions_TA=seen.actions_TA, places_TP=corridor)
    with pytest.raises(ValueError, match="--walks: 1 held-out walks show too few goals 2 rooms"):
        draw_tasks(player, plan(), [nowhere], "two", 2, seed=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_who_knows_the_map_arrives_where_chance_mostly_does_not(
    kind: str, player: Player, tasks: dict[str, list[Task]]
) -> None:
    found = plan()
    knows = [run_episode(player, found, map_policy(found, t), t, STEPS) for t in tasks[kind]]
    assert all(e.reached and e.covered == 1 for e in knows)
    assert all(len(e.path_TP) == e.steps + 1 <= STEPS for e in knows)
    if kind == "two":
        chance = [
            run_episode(player, found, random_policy(5, t.seed), t, STEPS) for t in tasks[kind]
        ]
        assert np.mean([e.reached for e in chance]) < 0.5
        assert all(0 <= e.covered <= 1 for e in chance)


def test_an_episode_ends_on_arrival_or_when_its_steps_are_used_up(
    player: Player, tasks: dict[str, list[Task]]
) -> None:
    found, task = plan(), tasks["two"][0]
    stays = run_episode(player, found, lambda frames, place: 1, task, 7)  # turns on the spot
    assert (stays.reached, stays.steps, len(stays.path_TP)) == (False, 7, 8)
    assert stays.covered == pytest.approx(0, abs=0.05)


class Dreamer:
    """A world model of the picture's spot: the columns and rows where it is bright."""

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        red = frames_BCHW[:, -3].float()
        return torch.stack([red.sum(1).argmax(1), red.sum(2).argmax(1)], 1).float()

    def rollout(self, latents_BD: Tensor, actions_BHA: Tensor) -> Tensor:
        return latents_BD[None, :, None].expand(1, -1, actions_BHA.shape[1], -1)


def test_an_agent_sees_the_last_frames_and_presses_a_choice(
    player: Player, tasks: dict[str, list[Task]]
) -> None:
    seen = []

    class Recorder(Dreamer):
        def encode(self, frames_BCHW: Tensor) -> Tensor:
            seen.append(frames_BCHW)
            return super().encode(frames_BCHW)

    search = Search(horizon=3, samples=8, elites=2, rounds=2)
    agent = Agent(
        Recorder(),
        CategoricalActor(choices_KA=torch.from_numpy(player.choices_KA), search=search),
        IntrinsicCost(),
        action_width=3,
    )
    task = tasks["one"][0]
    policy = agent_policy(agent, 2, player.choices_KA, task)
    episode = run_episode(player, plan(), policy, task, 4)
    assert seen[0].shape == (1, 3, 48, 64)  # the goal is one picture
    assert all(frames.shape == (1, 6, 48, 64) for frames in seen[1:])
    assert torch.equal(seen[1][:, :3], seen[1][:, 3:])  # before the first frame nothing moved
    for earlier, later in itertools.pairwise(seen[1:]):
        assert torch.equal(later[:, :3], earlier[:, 3:])
    assert episode.decisions > 0
