"""The loop of an agent: perceive, remember, imagine, judge, act, and be surprised.

    observation -> perception -> latent -> actor( imagination, cost or critic ) -> first action
                                   |
                                 memory <- what was expected, what it cost, how wrong it was

Every part is handed in and can be replaced: anything with `encode` and `rollout` is a world model,
among them the true simulator (`worlds.two_rooms.TrueModel`): the oracle, which plans as we do.

Shape legend: B episodes, S plans of each, H steps of a plan, E predictors, D latent width, A action
width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.planning.actors.actor import Actor, Searcher
from models.planning.actors.categorical import CategoricalActor
from models.planning.configurator import AgentConfig
from models.planning.costs.critic import Critic
from models.planning.costs.intrinsic import (
    Future,
    Hazard,
    IntrinsicCost,
    Term,
    goal_distance,
    uncertainty,
)
from models.planning.memory import Memory


class Model(Protocol):
    """A world model, as an agent sees it."""

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Encodes observations as latents [B, D]."""
        ...

    def rollout(self, latents_BD: Tensor, actions_BHA: Tensor) -> Tensor:
        """Returns the latents after each action, by each predictor, [E, B, H, D]."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShuffledModel:
    """A control: imagines with the actions of another candidate, so plans cannot be told apart."""

    model: Model

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Encodes as the model does."""
        return self.model.encode(frames_BCHW)

    def rollout(self, latents_BD: Tensor, actions_BTA: Tensor) -> Tensor:
        """Imagines, with the actions of the rows in reverse order."""
        return self.model.rollout(latents_BD, actions_BTA.flip(0))


class Agent:
    """Plans a batch of episodes side by side, replanning before every step.

    Args:
        model: perceives and imagines.
        actor: searches.
        cost: judges every imagined step; its sum over the steps is what a plan costs.
        action_width: A.
        critic: stands in the place of the distance to the goal, which `cost` then must not hold;
            None for none.
        memory: takes a row for every step; None keeps none.
        seed: of the search.
    """

    def __init__(
        self,
        model: Model,
        actor: Searcher,
        cost: IntrinsicCost,
        *,
        action_width: int,
        critic: Critic | None = None,
        memory: Memory | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.actor, self.cost = model, actor, cost
        self.critic, self.memory, self._width = critic, memory, action_width
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def begin(self, goals: Tensor) -> None:
        """Begins episodes, given observations of their goals."""
        self._goals_BD = self.model.encode(goals)
        shape = (len(goals), self.actor.search.horizon, self._width)
        self._plans_BHA = torch.zeros(shape)
        self._expected_BD = torch.full_like(self._goals_BD, torch.nan)

    @torch.no_grad()
    def plan(self, observations: Tensor, rows: Tensor) -> Tensor:
        """Returns plans whose first action is to be taken now, [len(rows), H, A].

        Args:
            observations: of the episodes that still go on.
            rows: the numbers of these episodes, int64.
        """
        latents_BD, goals_BD = self.model.encode(observations), self._goals_BD[rows]

        def score(plans_BSHA: Tensor) -> Tensor:
            return self.judge(latents_BD, goals_BD, plans_BSHA)

        plans_BHA = self.actor.plan(score, self._plans_BHA[rows], self._generator)
        # What remains of the plan is where the next search starts.
        ended_B1A = torch.zeros_like(plans_BHA[:, :1])
        self._plans_BHA[rows] = torch.cat([plans_BHA[:, 1:], ended_B1A], dim=1)
        self._remember(latents_BD, goals_BD, plans_BHA[:, 0], rows)
        return plans_BHA

    def imagine(self, latents_BD: Tensor, goals_BD: Tensor, plans_BSHA: Tensor) -> Future:
        """Imagines every plan of every episode; rows go by episode, then by plan."""
        S = plans_BSHA.shape[1]
        actions_BTA = plans_BSHA.flatten(0, 1)
        starts_BD = latents_BD.repeat_interleave(S, dim=0)
        return Future(
            latents_EBTD=self.model.rollout(starts_BD, actions_BTA),
            actions_BTA=actions_BTA,
            goals_BD=goals_BD.repeat_interleave(S, dim=0),
        )

    def judge(self, latents_BD: Tensor, goals_BD: Tensor, plans_BSHA: Tensor) -> Tensor:
        """Returns the cost of every plan, [B, S]."""
        cost_BT = self.cost_of(self.imagine(latents_BD, goals_BD, plans_BSHA))
        return cost_BT.sum(1).view(plans_BSHA.shape[:2])

    def cost_of(self, future: Future) -> Tensor:
        """Returns the cost of every imagined step, with what is to come after it, [B, T]."""
        cost_BT = self.cost(future)
        if self.critic is None:
            return cost_BT
        to_come_EBT = self.critic(future.latents_EBTD, future.goals_BD[:, None])
        whole_BT: Tensor = cost_BT + to_come_EBT.mean(0)
        return whole_BT

    def _remember(
        self, latents_BD: Tensor, goals_BD: Tensor, actions_BA: Tensor, rows: Tensor
    ) -> None:
        """Writes a row of the memory; `surprise` is NaN in the first step of an episode."""
        if self.memory is None:
            return
        future = self.imagine(latents_BD, goals_BD, actions_BA[:, None, None])
        surprise_B = (latents_BD - self._expected_BD[rows]).norm(dim=-1)
        self._expected_BD[rows] = future.latents_EBTD.mean(0)[:, 0]
        self.memory.write(
            latents_BD,
            action=actions_BA,
            expected=self._expected_BD[rows],
            cost=self.cost_of(future)[:, 0],
            surprise=surprise_B,
        )


def build_agent(
    config: AgentConfig,
    model: Model,
    *,
    limit: Callable[[Tensor], Tensor],
    action_width: int,
    critic: Critic | None = None,
    readout: Callable[[Tensor], Tensor] | None = None,
    choices_KA: Tensor | None = None,
    seed: int = 0,
) -> Agent:
    """Builds an agent as the configurator asks for it.

    Args:
        config: from `configurator.configure`.
        model: the world model.
        limit: brings actions into the range that is allowed.
        action_width: A.
        critic: judges by the ways that it knows, instead of by distance; None judges by distance.
        readout: maps latents to places; needed where there are zones to stay out of.
        choices_KA: the actions that there are, for games; they are searched by categorical CEM,
            whatever the method. None where actions are numbers.
        seed: of the search.
    """
    terms: list[tuple[float, Term]] = [] if critic else [(1.0, goal_distance)]
    if config.zones:
        assert readout is not None, "zones need a readout"
        terms.append((config.hazard_weight, Hazard(zones=config.zones, readout=readout)))
    if config.uncertainty_weight:
        terms.append((config.uncertainty_weight, uncertainty))
    actor: Searcher = Actor(method=config.method, search=config.search, limit=limit)
    if choices_KA is not None:
        actor = CategoricalActor(choices_KA=choices_KA, search=config.search)
    return Agent(
        model,
        actor,
        IntrinsicCost(terms=tuple(terms)),
        action_width=action_width,
        critic=critic,
        memory=Memory(config.memory),
        seed=seed,
    )
