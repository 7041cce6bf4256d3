"""The rows that are compared: policies by name, made of one set of parts.

Shape suffixes: B episodes, 2 = (x, y) in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.planning.actors.policy import Policy as Distilled
from models.planning.actors.policy import PolicyAgent
from models.planning.agent import Agent, Model, ShuffledModel, build_agent
from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs.critic import Critic
from models.planning.costs.intrinsic import Future, Term, goal_distance
from models.planning.worlds.two_rooms import TrueModel, TwoRooms
from pipelines.planning.episodes import (
    Policy,
    Tasks,
    agent_policy,
    map_policy,
    random_policy,
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


@dataclass(frozen=True, kw_only=True)
class WayDistance:
    """The length of the way to the goal between places that are read off what is imagined.

    It knows the map, so it is what a critic without error would say of this model's latents.
    """

    readout: Callable[[Tensor], Tensor]

    def __call__(self, future: Future) -> Tensor:
        """Returns the length of the way from every step, in pixels, [B, T]."""
        places_BT2 = self.readout(future.latents_EBTD.mean(0))
        return WORLD.way_length(places_BT2, self.readout(future.goals_BD)[:, None])


def _by_distance(parts: Comparison, distance: Term) -> Fitted:
    return dataclasses.replace(parts.trained, distance=distance)


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
            parts, tasks, fitted=_by_distance(parts, goal_distance)
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
    "ours_way": Row(
        says="the trained model, judged by the way on the map: what a perfect critic would reach",
        policy=lambda parts, tasks: planner(
            parts, tasks, fitted=_by_distance(parts, WayDistance(readout=parts.trained.readout))
        ),
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
