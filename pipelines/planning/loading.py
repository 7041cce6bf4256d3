"""Loads the world model of a run, if it is one of the world that a job plays in."""

from __future__ import annotations

from typing import Any

from models.encoders.linear import use_linear
from models.objectives.objective import Objective
from models.planning.world_model.world_model import WorldModel
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoints import load_objective

RECIPES = {
    "tworooms": "worldmodel_tworooms",
    "my_way_home": "worldmodel_doom",
    "breakout": "worldmodel_breakout",
}
"""What learns each world."""


def load_world_model(
    uri: str, flag: str, env: str, there: tuple[int, int, int]
) -> tuple[WorldModel, PretrainConfig, dict[str, Any]]:
    """Loads a world model, frozen; arguments and results are else those of `load_objective`.

    Args:
        uri: a checkpoint or a run.
        flag: which names it.
        env: name of the world.
        there: height and width of its frames in pixels, and the numbers of an action.

    Raises:
        CheckpointError: as `load_objective`.
        ValueError: it is no world model, or one of a world of another kind.
    """
    objective, run, info = load_objective(uri)
    train_one = f"Train one: python -m pipelines.pretrain {RECIPES[env]}"
    if not isinstance(objective, WorldModel):
        raise ValueError(f"{flag}: {type(objective).__name__} is no world model.\n{train_one}")
    learned = (*run.model.height_width, run.objective.action_width)
    if learned != there:
        told = "{} x {} pixels and {} numbers an action"
        raise ValueError(
            f"{flag}: {run.run.name} has learned from {told.format(*learned)}.\n"
            f"--env {env} has {told.format(*there)}. {train_one}"
        )
    return frozen(objective), run, info


def frozen(objective: Objective) -> WorldModel:
    """Returns a world model that is not trained on, with layers for the rows of a search."""
    assert isinstance(objective, WorldModel)
    use_linear(objective.predictors, least=0)  # a search gives them thousands of rows
    return objective.eval().requires_grad_(False)
