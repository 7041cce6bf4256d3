"""The agent less each of its six modules, on the same episodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from models.planning.agent import Agent, Model
from models.planning.costs.intrinsic import IntrinsicCost
from pipelines.planning.episodes import HARDER, KINDS, Policy, Tasks
from pipelines.planning.rows import Comparison, Row, planner

EXAMS = (*KINDS, *HARDER)
"""The kinds of episodes of the table."""


@dataclass(frozen=True, kw_only=True)
class StillModel:
    """No world model: whatever is done, nothing moves."""

    model: Model

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Encodes as the model does."""
        return self.model.encode(frames_BCHW)

    def rollout(self, latents_BD: Tensor, actions_BTA: Tensor) -> Tensor:
        """Returns the latents as they are, after every action."""
        return latents_BD[None, :, None].expand(1, -1, actions_BTA.shape[1], -1)


def _no_perception(parts: Comparison, tasks: Tasks) -> Policy:
    assert parts.unperceived is not None
    return planner(parts, tasks, fitted=parts.unperceived, critic=True)


def _no_world_model(parts: Comparison, tasks: Tasks) -> Policy:
    still = replace(parts.trained, model=StillModel(model=parts.trained.model))
    return planner(parts, tasks, fitted=still, critic=True)


def without_memory(agent: Agent) -> None:
    """Makes an agent plan every step anew."""
    agent.memory = None


def _without_intrinsic_cost(agent: Agent) -> None:
    agent.cost = IntrinsicCost(terms=())


ABLATIONS = {
    "whole": Row(
        says="the agent with all its modules: `ours_critic`",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True),
    ),
    "no_configurator": Row(
        says="the same settings for every task: nobody tells of zones",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True, zones=()),
    ),
    "no_perception": Row(
        says="perception with fresh weights; predictor, critic and readout fitted on its latents",
        policy=_no_perception,
    ),
    "no_world_model": Row(
        says="whatever is done, nothing moves",
        policy=_no_world_model,
    ),
    "no_critic": Row(
        says="the distance of slow features instead of the critic: `ours`",
        policy=lambda parts, tasks: planner(parts, tasks),
    ),
    "no_intrinsic_cost": Row(
        says="the critic alone",
        policy=lambda parts, tasks: planner(
            parts, tasks, critic=True, change=_without_intrinsic_cost
        ),
    ),
    "no_actor": Row(
        says="random shooting with the same number of imagined steps",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True, method="shooting"),
    ),
    "no_memory": Row(
        says="every step plans anew, from what this frame shows",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True, change=without_memory),
    ),
}
"""The rows of the table in the order in which they are printed."""
