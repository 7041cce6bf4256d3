"""The loop of an agent: perceive, recall, imagine, judge, act, and remember.

    observation -> perception -> latent -> actor( imagination, cost or critic ) -> first action
                                   |         ^                                        |
                                   +------ memory: plans of similar situations <------+

From step to step the agent carries the plan that it follows and where it believes to be. Where a
frame is hidden, it goes on with what its last action should have led to. The memory keeps what it
planned, by where it was and where it wanted to be, also of other episodes; the search may begin
with what it finds there. An agent without a memory carries and keeps nothing.

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

from models.planning.actors.actor import Actor, Searcher, best
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
        memory: takes a row for every step, if any are recalled; None for an agent without one.
        recalled: K, plans of similar situations that the search is offered.
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
        recalled: int = 0,
        seed: int = 0,
    ) -> None:
        self.model, self.actor, self.cost = model, actor, cost
        self.critic, self.memory, self.recalled = critic, memory, recalled
        self._width = action_width
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def begin(self, goals: Tensor) -> None:
        """Begins episodes, given observations of their goals; the memory stays."""
        self._goals_BD = self.model.encode(goals)
        shape = (len(goals), self.actor.search.horizon, self._width)
        self._plans_BHA = self._goals_BD.new_zeros(shape)
        self._believed_BD = torch.full_like(self._goals_BD, torch.nan)

    @torch.no_grad()
    def plan(self, observations: Tensor, rows: Tensor, hidden_B: Tensor | None = None) -> Tensor:
        """Returns plans whose first action is to be taken now, [len(rows), H, A].

        Args:
            observations: of the episodes that still go on.
            rows: the numbers of these episodes, int64.
            hidden_B: which of the observations show nothing, bool; None for none.
        """
        latents_BD, goals_BD = self._perceive(observations, rows, hidden_B), self._goals_BD[rows]

        def score(plans_BSHA: Tensor) -> Tensor:
            return self.judge(latents_BD, goals_BD, plans_BSHA)

        situations_BX = torch.cat([latents_BD, goals_BD], dim=-1)
        starts_BKHA = self._recall(situations_BX, rows)
        start_BHA = starts_BKHA[:, 0]
        if starts_BKHA.shape[1] > 1:
            start_BHA = best(starts_BKHA, score(starts_BKHA), 1)[:, 0]
        plans_BHA = self.actor.plan(score, start_BHA, self._generator)
        if self.memory is not None:
            self._plans_BHA[rows], self._believed_BD[rows] = plans_BHA, latents_BD
            if self.recalled:
                self.memory.write(situations_BX, plan=plans_BHA)
        return plans_BHA

    def _perceive(self, observations: Tensor, rows: Tensor, hidden_B: Tensor | None) -> Tensor:
        """Encodes what is seen; what is hidden is expected, if there is anything to expect from."""
        latents_BD = self.model.encode(observations)
        if self.memory is None or hidden_B is None or not hidden_B.any():
            return latents_BD
        taken_B1A = self._plans_BHA[rows][:, :1]
        expected_BD = self.model.rollout(self._believed_BD[rows], taken_B1A).mean(0)[:, 0]
        known_B = hidden_B & expected_BD.isfinite().all(-1)
        return torch.where(known_B[:, None], expected_BD, latents_BD)

    def _recall(self, situations_BX: Tensor, rows: Tensor) -> Tensor:
        """Returns where the search may start, [B, 1 + K, H, A].

        First comes what remains of the last plan, then plans that were made in similar situations.
        """
        last_BHA = self._plans_BHA[rows]
        rest_BHA = torch.cat([last_BHA[:, 1:], torch.zeros_like(last_BHA[:, :1])], dim=1)
        if self.memory is None or not self.recalled or not len(self.memory):
            return rest_BHA[:, None]
        _, found = self.memory.read(situations_BX, self.recalled)
        return torch.cat([rest_BHA[:, None], found["plan"]], dim=1)

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


def build_agent(
    config: AgentConfig,
    model: Model,
    *,
    limit: Callable[[Tensor], Tensor],
    action_width: int,
    critic: Critic | None = None,
    distance: Term = goal_distance,
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
        distance: how far an imagined step is from the goal, where there is no critic.
        readout: maps latents to places; needed where there are zones to stay out of.
        choices_KA: the actions that there are, for games; they are searched by categorical CEM,
            whatever the method. None where actions are numbers.
        seed: of the search.
    """
    terms: list[tuple[float, Term]] = [] if critic else [(1.0, distance)]
    if config.zones:
        assert readout is not None, "zones need a readout"
        hazard = Hazard(zones=config.zones, readout=readout, clearance=config.clearance)
        terms.append((config.hazard_weight, hazard))
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
        recalled=config.recalled,
        seed=seed,
    )
