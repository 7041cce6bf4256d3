"""Batches of plans and predictions, against the agent itself and in the true world."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from helpers.serve.planning import (
    TASK,
    WORLD,
    frame_at,
    fresh_agent,
    seeing_agent,
    walk,
)
from models.planning.saved_agent import SavedAgent
from serve.planning.contract import Floats, Pixels, Plan, PlanQuery, Prediction, PredictQuery
from serve.planning.replica.imagination import Imagination, PlanTask
from serve.planning.replica.sessions import Session


def plan_task(
    observation: Pixels, goal: Pixels, agent: SavedAgent, session: Session | None = None, **task
) -> PlanTask:
    frames = observation if observation.ndim == 4 else observation[None]
    query = PlanQuery(observation_hHWC=frames, goal_HWC=goal, session="s", task={})
    spec = dataclasses.replace(agent.task, **task)
    return PlanTask(query=query, spec=spec, session=session)


def after(plan: Plan) -> Session:
    return Session(
        goal="g",
        rest_KA=plan.actions_KA[1:],
        expected_D=plan.imagined.latents_KD[0],
        step=plan.step + 1,
    )


def plans(imagination: Imagination, tasks: list[PlanTask]) -> list[Plan]:
    found = imagination.run([*tasks])
    assert all(isinstance(each, Plan) for each in found)
    return [each for each in found if isinstance(each, Plan)]


def test_many_sessions_reach_their_goals_in_the_true_world() -> None:
    agent = seeing_agent()
    imagination = Imagination(agent)
    starts, goals = zip(*walk(6, seed=1), strict=True)
    seeing = agent.model
    places = seeing.encode(torch.from_numpy(np.stack(starts)).permute(0, 3, 1, 2))
    wanted = seeing.encode(torch.from_numpy(np.stack(goals)).permute(0, 3, 1, 2))
    sessions: list[Session | None] = [None] * 6
    reached = WORLD.reached(places, wanted)
    assert not reached.any()
    surprises = []
    for step in range(25):
        frames = [frame_at(*place) for place in places.tolist()]
        tasks = [plan_task(*row, agent, last) for *row, last in
                 zip(frames, goals, sessions, strict=True)]  # fmt: skip
        found = plans(imagination, tasks)
        assert [plan.step for plan in found] == [step] * 6
        surprises += [plan.surprise for plan in found if plan.surprise is not None]
        places = WORLD.step(places, torch.from_numpy(np.stack([p.actions_KA[0] for p in found])))
        reached |= WORLD.reached(places, wanted)
        sessions = [after(plan) for plan in found]
        if reached.all():
            break
    assert reached.all()
    assert max(surprises) < 0.1  # pixels: what happens is what was expected


def test_a_search_goes_on_from_the_last_plan() -> None:
    """With a budget for hardly any search, the plan stays near where it started from."""
    agent = seeing_agent(budget=96, steps=16)
    observation, goal = frame_at(3, 16), frame_at(13, 16)
    straight = np.tile(np.array([1.5, 0.0], np.float32), (15, 1))
    last = Session(goal="g", rest_KA=straight, expected_D=np.array([3.0, 12.0], np.float32), step=4)
    cold, warm = plans(Imagination(agent), [plan_task(observation, goal, agent),
                                            plan_task(observation, goal, agent, last)])  # fmt: skip
    assert warm.imagined.goal_K is not None
    assert cold.imagined.goal_K is not None
    assert warm.costs_K.sum() < cold.costs_K.sum()
    assert (cold.surprise, cold.step) == (None, 0)
    assert (warm.surprise, warm.step) == (pytest.approx(4.0, abs=0.05), 4)


def test_what_is_told_of_a_plan_is_what_the_agent_says() -> None:
    agent = fresh_agent(ensemble=2)
    (plan,) = plans(Imagination(agent), [plan_task(frame_at(3, 3), frame_at(9, 9), agent)])
    frames = torch.from_numpy(np.stack([frame_at(3, 3), frame_at(9, 9)])).permute(0, 3, 1, 2)
    start_BD, goal_BD = agent.model.encode(frames).chunk(2)
    found_EBKD = agent.model.rollout(start_BD, torch.from_numpy(plan.actions_KA)[None])
    assert plan.actions_KA.shape == (4, 2)
    assert np.linalg.norm(plan.actions_KA, axis=1).max() <= WORLD.max_step + 1e-5
    assert plan.imagined_steps == 96

    def close(told: Floats | None, expected: torch.Tensor) -> None:
        assert told is not None
        np.testing.assert_allclose(told, expected.numpy(), rtol=1e-4, atol=1e-5)

    close(plan.imagined.latents_KD, found_EBKD.mean(0)[0])
    close(plan.imagined.goal_K, (found_EBKD - goal_BD).norm(dim=-1).mean(0)[0])
    close(
        plan.imagined.disagreement_K, found_EBKD.std(0, unbiased=False)[0].square().mean(1).sqrt()
    )
    assert agent.readout is not None
    assert agent.critic is not None
    close(plan.imagined.places_K2, agent.readout(found_EBKD.mean(0)[0]))
    close(plan.costs_K, agent.critic(found_EBKD[:, 0], goal_BD).mean(0))


def test_predictions_of_all_kinds_in_one_batch() -> None:
    agent = seeing_agent()
    right = np.tile(np.array([1.0, 0.0], np.float32), (3, 1))
    path = np.stack([frame_at(x, 10) for x in (4, 5, 6, 9)])
    short = PredictQuery(frames_THWC=path[:1], actions_KA=right, goal_HWC=None)
    whole = PredictQuery(frames_THWC=path, actions_KA=right, goal_HWC=None)
    goal = PredictQuery(frames_THWC=path[:1], actions_KA=right[:2], goal_HWC=frame_at(8, 10))
    task = plan_task(path[0], path[3], agent)
    found = Imagination(agent).run([short, goal, task, whole])
    assert isinstance(found[2], Plan)
    first, second, third = found[0], found[1], found[3]
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    assert isinstance(third, Prediction)
    np.testing.assert_allclose(first.imagined.latents_KD, [[5, 10], [6, 10], [7, 10]], atol=0.02)
    assert first.imagined.goal_K is None
    assert first.errors_K.shape == (0,)
    np.testing.assert_allclose(second.imagined.goal_K, [3, 2], atol=0.02)
    np.testing.assert_allclose(third.errors_K, [0, 0, 2], atol=0.02)  # the last frame is elsewhere


def test_a_session_that_went_wrong_spoils_nobody_else() -> None:
    agent = seeing_agent()
    bad = Session(goal="g", rest_KA=np.full((15, 2), np.nan, np.float32),
                  expected_D=np.full(2, np.nan, np.float32), step=1)  # fmt: skip
    good = plan_task(frame_at(3, 16), frame_at(12, 16), agent)
    spoilt = plan_task(frame_at(3, 16), frame_at(12, 16), agent, bad)
    alone, beside, _ = plans(Imagination(agent), [good, good, spoilt])
    assert np.isfinite(alone.actions_KA).all()
    assert np.isfinite(beside.actions_KA).all()


def test_tasks_of_other_settings_are_searched_on_their_own() -> None:
    agent = fresh_agent()
    frames = frame_at(3, 3), frame_at(9, 9)
    tasks = [
        plan_task(*frames, agent),
        plan_task(*frames, agent, steps=2, budget=60, method="mppi"),
        plan_task(*frames, agent),
    ]
    assert tasks[0].spec == TASK
    found = plans(Imagination(agent), tasks)
    assert [len(plan.actions_KA) for plan in found] == [4, 2, 4]
    assert [plan.imagined_steps for plan in found] == [96, 60, 96]
