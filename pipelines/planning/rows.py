"""The rows that are always compared, and one part of one row as a Ray task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.planning.agent import Model, ShuffledModel, build_agent
from models.planning.configurator import AgentConfig
from models.planning.costs.critic import Critic
from models.planning.world_model.readout import Readout
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

ROWS = {
    "random": "full steps in random directions",
    "untrained": "the same agent with a model of fresh weights",
    "shuffled": "the trained model, imagining with the actions of other candidates",
    "control": "the checkpoint of --control",
    "ours": "the trained model, judged by distance in its latents",
    "ours_critic": "the trained model, judged by the critic",
    "oracle_cem": "the true simulator in place of the model, judged by distance",
    "map": "who knows the map",
}
"""The rows in the order in which they are printed, and what each one is."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that rows are made of; goes to every task once, through Ray's object store."""

    model: Model
    settings: Mapping[str, Any]
    """What the model is built from; see `models.planning.saved_agent`."""
    untrained: Model
    control: Model | None
    critic: Critic
    readout: Readout
    config: AgentConfig
    steps: int
    seed: int

    @property
    def rows(self) -> list[str]:
        """The rows that there are."""
        return [name for name in ROWS if name != "control" or self.control is not None]


def run_row(comparison: Comparison, row: str, tasks: Tasks) -> tuple[Episodes, float]:
    """Runs the episodes of a row; returns them and the seconds that they took."""
    torch.set_num_threads(1)
    world, start = TwoRooms(), time.perf_counter()
    found = run_episodes(world, _policy(comparison, row, tasks, world), tasks, comparison.steps)
    return found, time.perf_counter() - start


def _policy(comparison: Comparison, row: str, tasks: Tasks, world: TwoRooms) -> Policy:
    if row == "random":
        return random_policy(world, comparison.seed)
    if row == "map":
        return map_policy(world, tasks)
    true = TrueModel(world=world)
    models: dict[str, Model | None] = {
        "untrained": comparison.untrained,
        "shuffled": ShuffledModel(model=comparison.model),
        "control": comparison.control,
        "ours": comparison.model,
        "ours_critic": comparison.model,
        "oracle_cem": true,
    }
    model = models[row]
    assert model is not None, row
    observe: Callable[[Tensor], Tensor] = true.encode if row == "oracle_cem" else world.render
    agent = build_agent(
        comparison.config,
        model,
        limit=world.shortened,
        action_width=2,
        critic=comparison.critic if row == "ours_critic" else None,
        readout=true.encode if row == "oracle_cem" else comparison.readout,
        seed=comparison.seed,
    )
    return agent_policy(agent, observe, tasks)
