"""The rows that are compared: policies by name, made of one set of parts, and run in Ray tasks.

Shape suffixes: B episodes, 2 = (x, y) in pixels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.planning.actors.policy import Policy as Distilled
from models.planning.actors.policy import PolicyAgent
from models.planning.agent import Agent, Model, ShuffledModel, build_agent
from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs.critic import Critic
from models.planning.costs.intrinsic import Term, goal_distance
from models.planning.worlds.two_rooms import TrueModel, TwoRooms
from pipelines.planning.episodes import (
    Episodes,
    Policy,
    Tasks,
    agent_policy,
    map_policy,
    random_policy,
    run_episodes,
)

WORLD = TwoRooms()


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A world model, and what was fitted on the latents of walks."""

    model: Model
    critic: Critic | None
    distance: Term
    readout: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that rows are made of; goes to every task once, through Ray's object store."""

    trained: Fitted
    settings: Mapping[str, Any]
    """What the model is built from; see `models.planning.saved_agent`."""
    untrained: Model
    control: Fitted | None
    task: TaskSpec
    """What the configurator is told; the zones are those of the episodes."""
    rules: Rules
    seed: int
    distilled: Distilled | None = None
    """The policy of the row `distilled`."""
    unperceived: Fitted | None = None
    """What the ablation `no_perception` plans with."""

    @property
    def rows(self) -> list[str]:
        """The rows that there are."""
        return [name for name in ROWS if name != "control" or self.control is not None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A policy that is compared."""

    says: str
    """What it is, for the table."""
    policy: Callable[[Comparison, Tasks], Policy]


def planner(
    parts: Comparison,
    tasks: Tasks,
    *,
    fitted: Fitted | None = None,
    critic: bool = False,
    rules: Rules | None = None,
    observe: Callable[[Tensor], Tensor] = WORLD.render,
    change: Callable[[Agent], None] = lambda agent: None,
    **task: Any,
) -> Policy:
    """Returns the policy of an agent that plans by what it imagines.

    Args:
        parts: what it is made of, if nothing else is said.
        tasks: the episodes; their zones are part of what the configurator is told.
        fitted: the world model with what was fitted on it; None for the trained one.
        critic: whether the critic judges, in the place of the distance.
        rules: the configurator's numbers; None for those of the parts.
        observe: what it sees of places; by default pictures.
        change: may change the agent that was built.
        **task: fields of the task that differ.
    """
    told = dataclasses.replace(parts.task, **{"zones": tasks.zones} | task)
    used = fitted or parts.trained
    agent = build_agent(
        configure(told, rules or parts.rules),
        used.model,
        limit=WORLD.shortened,
        action_width=2,
        critic=used.critic if critic else None,
        distance=used.distance,
        readout=used.readout,
        seed=parts.seed,
    )
    change(agent)
    return agent_policy(agent, observe, tasks)


def oracle(parts: Comparison, tasks: Tasks) -> Policy:
    """Returns the policy of the same search in the true simulator, judged by distance."""
    true = TrueModel(world=WORLD)
    fitted = Fitted(model=true, critic=None, distance=goal_distance, readout=true.encode)
    return planner(parts, tasks, fitted=fitted, observe=true.encode)


def _with_model(parts: Comparison, model: Model) -> Fitted:
    return dataclasses.replace(parts.trained, model=model)


def _distilled(parts: Comparison, tasks: Tasks) -> Policy:
    assert parts.distilled is not None
    agent = PolicyAgent(parts.trained.model.encode, parts.distilled, WORLD.shortened)
    return agent_policy(agent, WORLD.render, tasks)


ROWS = {
    "random": Row(
        says="full steps in random directions",
        policy=lambda parts, tasks: random_policy(WORLD, parts.seed),
    ),
    "untrained": Row(
        says="the same agent with a model of fresh weights",
        policy=lambda parts, tasks: planner(
            parts, tasks, fitted=_with_model(parts, parts.untrained)
        ),
    ),
    "shuffled": Row(
        says="the trained model, imagining with the actions of other candidates",
        policy=lambda parts, tasks: planner(
            parts, tasks, fitted=_with_model(parts, ShuffledModel(model=parts.trained.model))
        ),
    ),
    "control": Row(
        says="the checkpoint of --control, in all else as `ours`",
        policy=lambda parts, tasks: planner(parts, tasks, fitted=parts.control),
    ),
    "ours_plain": Row(
        says="the trained model, judged by the distance of its latents",
        policy=lambda parts, tasks: planner(
            parts, tasks, fitted=dataclasses.replace(parts.trained, distance=goal_distance)
        ),
    ),
    "ours": Row(
        says="the trained model, judged by the distance of its slow features",
        policy=lambda parts, tasks: planner(parts, tasks),
    ),
    "ours_critic": Row(
        says="the trained model, judged by the critic",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True),
    ),
    "oracle_cem": Row(
        says="the true simulator in place of the model, judged by distance",
        policy=oracle,
    ),
    "map": Row(
        says="who knows the map",
        policy=lambda parts, tasks: map_policy(WORLD, tasks),
    ),
}
"""The rows of the comparison in the order in which they are printed."""
DISTILLED = Row(says="the policy distilled from the plans of `ours_critic`", policy=_distilled)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Episodes of one row."""

    row: Row
    tasks: Tasks
    budget: int | None = None
    """Imagined steps that one action may cost; None for that of the parts."""


def run_job(parts: Comparison, job: Job) -> tuple[Episodes, float]:
    """Runs the episodes of a job; returns them and the seconds that they took."""
    torch.set_num_threads(1)
    if job.budget is not None:
        task = dataclasses.replace(parts.task, budget=job.budget)
        parts = dataclasses.replace(parts, task=task)
    start = time.perf_counter()
    found = run_episodes(WORLD, job.row.policy(parts, job.tasks), job.tasks, parts.task.steps)
    return found, time.perf_counter() - start


Played = list[tuple[Episodes, float]]
"""Episodes and seconds of each job."""
Each = Callable[[Comparison, Callable[[Comparison, Any], Any], Sequence[Any]], list[Any]]
"""Does some work with the parts for every item, and returns what it found, in order."""


def in_tasks(
    parts: Comparison, work: Callable[[Comparison, Any], Any], items: Sequence[Any]
) -> list[Any]:
    """An `Each` that uses one Ray task for every item."""
    import ray

    from pipelines.runtime.cluster import start_ray

    start_ray()
    shared, remote = ray.put(parts), ray.remote(num_cpus=1)(work)
    found: list[Any] = ray.get([remote.remote(shared, item) for item in items])
    return found


def chunked(tasks: Tasks, chunk: int) -> list[Tasks]:
    """Divides tasks into parts of at most `chunk` episodes."""
    return [tasks.part(slice(first, first + chunk)) for first in range(0, len(tasks), chunk)]


def play(parts: Comparison, jobs: Sequence[Job], chunk: int, each: Each) -> Played:
    """Runs jobs, `chunk` episodes at a time; returns what `run_job` does of each."""
    parted = [
        [dataclasses.replace(job, tasks=tasks) for tasks in chunked(job.tasks, chunk)]
        for job in jobs
    ]
    found = iter(each(parts, run_job, [part for of in parted for part in of]))
    return [_joined([next(found) for _ in of]) for of in parted]


def _joined(found: Played) -> tuple[Episodes, float]:
    names = [field.name for field in dataclasses.fields(Episodes)]
    columns: dict[str, Tensor] = {
        name: torch.cat([getattr(episodes, name) for episodes, _ in found]) for name in names
    }
    return Episodes(**columns), sum(seconds for _, seconds in found)
