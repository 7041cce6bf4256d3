"""The configurator: what a task asks for, as settings of the agent's other parts.

How far to look ahead, how much of the budget goes into breadth, which costs count, and how much to
remember. The numbers are `Rules`, which `pipelines.plan_episodes --tune` chooses by a search on
episodes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.planning.actors.actor import Search
from models.planning.costs.intrinsic import Zone

LIMITS = {
    "horizon": (1, 10_000),
    "rounds": (1, 10_000),
    "elites": (0.001, 1),
    "hazard_weight": (0, 1e6),
    "clearance": (0, 1e6),
    "recalled": (0, 10_000),
    "memory": (1, 10_000),
}
"""Least and greatest value of each of the rules."""
MOST_BUDGET = 1_000_000
"""Most imagined steps of an action: they lie in memory at the same time, a third of them or so, for
every episode."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The numbers that the configurator goes by, whatever the task."""

    horizon: int = 16
    """Longest look ahead, steps; beyond it the models' errors grow."""
    rounds: int = 3
    """Rounds of the search."""
    elites: float = 0.1
    """Share of the samples that are elites."""
    hazard_weight: float = 4.0
    """Weight of a pixel of depth in a zone to stay out of, beside a unit of distance to the
    goal."""
    clearance: float = 1.0
    """Distance to keep from zones, in pixels: what is imagined errs by about as much."""
    recalled: int = 0
    """Plans of similar situations that the search is offered; they count in the budget."""
    memory: int = 40
    """Steps that are remembered, in steps of an episode."""

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:  # nor is NaN
                flag = f"--rules.{name.replace('_', '-')}"
                raise ValueError(f"{flag}: must be between {least:g} and {most:g}, got {value}")


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
    clearance: float
    uncertainty_weight: float
    zones: tuple[Zone, ...]
    memory: int
    """Rows that are remembered."""
    recalled: int
    """Remembered plans that the search is offered."""


def configure(task: TaskSpec, rules: Rules = Rules()) -> AgentConfig:
    """Chooses the settings for a task.

    Raises:
        ValueError: the budget is too small for any search, or beyond `MOST_BUDGET`.
    """
    if task.budget > MOST_BUDGET:
        raise ValueError(f"--budget: at most {MOST_BUDGET:,} imagined steps, got {task.budget}")
    horizon = min(rules.horizon, task.steps)
    samples = (task.budget // horizon - _offered(rules)) // rules.rounds
    if samples < 2:
        least = least_budget(task, rules)
        raise ValueError(f"--budget: needs at least {least} imagined steps, got {task.budget}")
    elites = min(samples - 1, max(2, round(rules.elites * samples)))  # all would select nothing
    return AgentConfig(
        method=task.method,
        search=Search(horizon=horizon, samples=samples, elites=elites, rounds=rules.rounds),
        hazard_weight=rules.hazard_weight if task.zones else 0.0,
        clearance=rules.clearance,
        uncertainty_weight=task.caution,
        zones=task.zones,
        memory=rules.memory * task.steps,
        recalled=rules.recalled,
    )


def least_budget(task: TaskSpec, rules: Rules) -> int:
    """Returns the imagined steps an action that a search by these rules needs at least."""
    return (2 * rules.rounds + _offered(rules)) * min(rules.horizon, task.steps)


def _offered(rules: Rules) -> int:
    """Returns the plans that are imagined before the first round: remembered ones and the last."""
    return rules.recalled + 1 if rules.recalled else 0
