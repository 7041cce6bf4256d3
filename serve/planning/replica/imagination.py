"""Answers batches of plan and prediction tasks with an agent. Torch alone, without Serve.

    plan        the agent's actor searches for the actions of least cost, from z = encode(frame)
    prediction  p_0 = z_0,  p_k = the model's rollout of the actions given
    distance    |p_k - z_goal| and |p_k - z_k|, Euclidean, mean over the predictors

Tasks with the same settings share one search. Rows of a batch do not mix, so what one request holds
cannot spoil another's answer.

Shape legend: B tasks or states, h frames of history, H height, W width, C channels, K steps, T
states that were seen, A action width, D state width, E predictors, S plans of a round.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.planning.configurator import TaskSpec
from models.planning.costs.intrinsic import Future, uncertainty
from models.planning.saved_agent import SavedAgent
from serve.planning.contract import (
    Floats,
    Imagined,
    Pixels,
    Plan,
    PlanQuery,
    Prediction,
    PredictQuery,
)
from serve.planning.replica.sessions import Session


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanTask:
    """A plan to find."""

    query: PlanQuery
    spec: TaskSpec
    session: Session | None
    """What the session's last plan left."""


Task = PlanTask | PredictQuery
Answer = Plan | Prediction


class Imagination:
    """Runs batches of tasks; several may run at the same time, in threads.

    Args:
        saved: the agent.
        seed: of the searches, which are numbered.
    """

    def __init__(self, saved: SavedAgent, seed: int = 0) -> None:
        self._saved, self._searches = saved, itertools.count(seed)

    @torch.inference_mode()
    def run(self, tasks: list[Task]) -> list[Answer]:
        """Returns the answers, in order."""
        alike: dict[TaskSpec | int, list[int]] = {}
        for number, task in enumerate(tasks):
            key = task.spec if isinstance(task, PlanTask) else len(task.actions_KA)
            alike.setdefault(key, []).append(number)
        answers: dict[int, Answer] = {}
        for key, numbers in alike.items():
            group = [tasks[number] for number in numbers]
            found: list[Plan] | list[Prediction]
            if isinstance(key, TaskSpec):
                found = self._plan(key, [task for task in group if isinstance(task, PlanTask)])
            else:
                found = self._predict([task for task in group if isinstance(task, PredictQuery)])
            answers.update(zip(numbers, found, strict=True))
        return [answers[number] for number in range(len(tasks))]

    def _plan(self, spec: TaskSpec, tasks: list[PlanTask]) -> list[Plan]:
        agent = self._saved.agent(spec)
        states_BD = self._encode(np.stack([task.query.observation_hHWC for task in tasks]))
        goals_BD = self._encode(np.stack([task.query.goal_HWC[None] for task in tasks]))
        shape = (agent.actor.search.horizon, self._saved.actions.width)
        starts_BKA = torch.stack([_start(task.session, shape) for task in tasks])
        judged = 0

        def score(plans_BSKA: Tensor) -> Tensor:
            nonlocal judged
            judged += plans_BSKA[0, ..., 0].numel()
            return agent.judge(states_BD, goals_BD, plans_BSKA)

        generator = torch.Generator().manual_seed(next(self._searches))
        plans_BKA = agent.actor.plan(score, starts_BKA, generator)
        future = agent.imagine(states_BD, goals_BD, plans_BKA[:, None])
        rows = zip(
            tasks,
            states_BD.numpy(),
            plans_BKA.numpy(),
            agent.cost_of(future).numpy(),
            self._imagined(future, [True] * len(tasks)),
            strict=True,
        )
        return [
            Plan(
                actions_KA=plan_KA,
                imagined=imagined,
                costs_K=costs_K,
                surprise=_surprise(state_D, task.session),
                step=task.session.step if task.session else 0,
                imagined_steps=judged,
            )
            for task, state_D, plan_KA, costs_K, imagined in rows
        ]

    def _predict(self, queries: list[PredictQuery]) -> list[Prediction]:
        """Imagines the actions of queries that have equally many of them."""
        h = self._saved.model.history
        windows = [_windows(query.frames_THWC, h) for query in queries]
        seen = torch.split(self._encode(np.concatenate(windows)), [len(each) for each in windows])
        starts_BD = torch.stack([states_TD[0] for states_TD in seen])
        goals_BD = starts_BD.clone()
        has_goal = [query.goal_HWC is not None for query in queries]
        if any(has_goal):
            wanted = [query.goal_HWC[None] for query in queries if query.goal_HWC is not None]
            goals_BD[torch.tensor(has_goal)] = self._encode(np.stack(wanted))
        actions_BKA = torch.from_numpy(np.stack([query.actions_KA for query in queries]))
        future = Future(
            latents_EBTD=self._saved.model.rollout(starts_BD, actions_BKA),
            actions_BTA=actions_BKA,
            goals_BD=goals_BD,
        )
        return [
            Prediction(imagined=imagined, errors_K=_errors(future.latents_EBTD[:, row], states_TD))
            for row, (imagined, states_TD) in enumerate(
                zip(self._imagined(future, has_goal), seen, strict=True)
            )
        ]

    def _encode(self, frames_BhHWC: Pixels) -> Tensor:
        """Returns states [B, D], of h frames or of one in which nothing moves."""
        frames_BhCHW = torch.from_numpy(frames_BhHWC).permute(0, 1, 4, 2, 3)
        return self._saved.model.encode(frames_BhCHW.flatten(1, 2))

    def _imagined(self, future: Future, has_goal: list[bool]) -> list[Imagined]:
        """Returns what is told of each imagined sequence of actions."""
        mean_BKD = future.latents_EBTD.mean(0)
        away_EBK = (future.latents_EBTD - future.goals_BD[:, None]).norm(dim=-1)
        apart_BK = uncertainty(future) if len(future.latents_EBTD) > 1 else None
        readout = self._saved.readout
        places_BK2 = readout(mean_BKD) if readout else None
        return [
            Imagined(
                latents_KD=mean_BKD[row].numpy(),
                goal_K=away_EBK.mean(0)[row].numpy() if has_goal[row] else None,
                disagreement_K=None if apart_BK is None else apart_BK[row].numpy(),
                places_K2=None if places_BK2 is None else places_BK2[row].numpy(),
            )
            for row in range(len(mean_BKD))
        ]


def _start(session: Session | None, shape: tuple[int, int]) -> Tensor:
    """Returns the plan that a search starts from: what is left of the last one, then nothing."""
    start_KA = torch.zeros(shape)
    if session is not None:
        rest = torch.from_numpy(session.rest_KA[: len(start_KA)])
        start_KA[: len(rest)] = rest
    return start_KA


def _surprise(state_D: Floats, session: Session | None) -> float | None:
    if session is None:
        return None
    return float(np.linalg.norm(state_D - session.expected_D))


def _windows(frames_THWC: Pixels, history: int) -> Pixels:
    """Returns the last h frames at each time that has so many, [T - h + 1, h, H, W, C]."""
    times = range(len(frames_THWC) - history + 1)
    return np.stack([frames_THWC[time : time + history] for time in times])


def _errors(expected_EKD: Tensor, seen_TD: Tensor) -> Floats:
    """Returns the distance of what was expected from what came, for each state after the first."""
    count = len(seen_TD) - 1
    errors_K: Floats = (expected_EKD[:, :count] - seen_TD[1:]).norm(dim=-1).mean(0).numpy()
    return errors_K
