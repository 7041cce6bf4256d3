"""The rows that are compared in a game, and one part of one row as a Ray task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from models.planning.agent import ShuffledModel, build_agent
from models.planning.configurator import AgentConfig
from models.planning.costs.critic import Critic
from models.planning.costs.intrinsic import Future, goal_distance
from models.planning.costs.slow_distance import SlowDistance
from models.planning.world_model.world_model import WorldModel
from pipelines.planning.games.floor_plan import FloorPlan
from pipelines.planning.games.navigation import (
    Episode,
    Policy,
    Task,
    agent_policy,
    map_policy,
    random_policy,
    run_episode,
)
from pipelines.planning.games.worlds import GAME_WORLDS, Player

ROWS = {
    "random": "choices at random, each held for some steps",
    "untrained": "the same agent with a model of fresh weights",
    "shuffled": "the trained model, imagining with the actions of other candidates",
    "ours_plain": "the trained model, judged by the distance of its latents",
    "ours": "the trained model, judged by the distance of its slow features",
    "ours_critic": "the trained model, judged by the critic",
    "map": "the shortest way, by who knows map and place",
}
"""The rows in the order in which they are printed, and what each one is."""
CURVE = "ours"
"""The row that is played with further budgets."""


@dataclass(frozen=True)
class Plain:
    """The distance of latents, where states hold more than a goal's picture tells, of the rest."""

    told: int | None
    """See `WorldModel.told`."""

    def __call__(self, future: Future) -> torch.Tensor:
        """Returns the distance from the goal at every step, [B, T]."""
        told = slice(None if self.told is None else -self.told, None)
        latents_EBTD, goals_BD = future.latents_EBTD[..., told], future.goals_BD[..., told]
        return goal_distance(replace(future, latents_EBTD=latents_EBTD, goals_BD=goals_BD))


@dataclass(frozen=True, kw_only=True)
class GameComparison:
    """All that rows are made of; goes to every task once, through Ray's object store."""

    env: str
    model: WorldModel
    untrained: WorldModel
    critic: Critic
    distance: SlowDistance
    plan: FloorPlan
    configs: Mapping[int, AgentConfig]
    """Settings of the agent by budget; all rows have the first, `CURVE` every one."""
    steps: int

    @property
    def rows(self) -> list[tuple[str, int]]:
        """The rows, each with its budget."""
        first, *more = self.configs
        return [(row, first) for row in ROWS] + [(CURVE, budget) for budget in more]


def run_part(comparison: GameComparison, row: str, budget: int, tasks: list[Task]) -> list[Episode]:
    """Runs some episodes of a row, one after the other in one engine."""
    torch.set_num_threads(1)
    player = GAME_WORLDS[comparison.env].start()
    try:
        return [
            run_episode(
                player,
                comparison.plan,
                _policy(comparison, row, budget, task, player),
                task,
                comparison.steps,
            )
            for task in tasks
        ]
    finally:
        player.close()


def _policy(
    comparison: GameComparison, row: str, budget: int, task: Task, player: Player
) -> Policy:
    if row == "random":
        return random_policy(len(player.choices_KA), task.seed)
    if row == "map":
        return map_policy(comparison.plan, task)
    model = comparison.untrained if row == "untrained" else comparison.model
    agent = build_agent(
        comparison.configs[budget],
        ShuffledModel(model=model) if row == "shuffled" else model,
        limit=lambda actions: actions,
        action_width=player.choices_KA.shape[1],
        critic=comparison.critic if row == "ours_critic" else None,
        distance=Plain(model.told) if row == "ours_plain" else comparison.distance,
        choices_KA=torch.from_numpy(player.choices_KA),
        seed=task.seed,
    )
    return agent_policy(agent, model.history, player.choices_KA, task)
