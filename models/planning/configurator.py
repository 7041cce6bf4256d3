"""The configurator: what a task asks for, as settings of the agent's other parts.

Rules, not learning: how far to look ahead, how much of the budget goes into breadth, which costs
count, and how much to remember.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.planning.actors.actor import Search
from models.planning.costs.intrinsic import Zone

ROUNDS = 3
"""Rounds of the search."""
ELITES = 0.1
"""Share of the samples that are elites."""
HORIZON = 16
"""Longest look ahead; beyond it the models' errors grow."""
HAZARD_WEIGHT = 4.0
"""Weight of a pixel of depth in a zone to stay out of, beside a unit of distance to the goal."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What is to be done, beside the goal itself."""

    steps: int = 50
    """Steps that the episode may take."""
    budget: int = 4800
    """Imagined steps that one action may cost."""
    zones: tuple[Zone, ...] = ()
    """Regions to stay out of."""
    caution: float = 0.0
    """Weight of the disagreement of an ensemble's predictors."""
    method: str = "cem"
    """Method of the search, one of `models.planning.actors.actor.METHODS`."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of an agent's parts."""

    method: str
    search: Search
    hazard_weight: float
    uncertainty_weight: float
    zones: tuple[Zone, ...]
    memory: int
    """Rows that are remembered."""


def configure(task: TaskSpec) -> AgentConfig:
    """Chooses the settings for a task.

    Raises:
        ValueError: the budget is too small for any search.
    """
    horizon = min(HORIZON, task.steps)
    samples = task.budget // (ROUNDS * horizon)
    if samples < 2:
        least = 2 * ROUNDS * horizon
        raise ValueError(f"--budget: needs at least {least} imagined steps, got {task.budget}")
    elites = min(samples, max(2, round(ELITES * samples)))
    return AgentConfig(
        method=task.method,
        search=Search(horizon=horizon, samples=samples, elites=elites, rounds=ROUNDS),
        hazard_weight=HAZARD_WEIGHT if task.zones else 0.0,
        uncertainty_weight=task.caution,
        zones=task.zones,
        memory=4 * task.steps,
    )
