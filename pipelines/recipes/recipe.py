"""The decorator that makes a function a recipe: a named, complete pretraining run."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.config.train import PretrainConfig

Recipe = Callable[[], PretrainConfig]

REGISTERED: dict[str, Recipe] = {}
"""Recipes by name, in the order in which the modules define them."""


def recipe(function: Recipe) -> Recipe:
    """Registers a function under its own name.

    The first line of its docstring is shown by `python -m pipelines.pretrain --help`. The rest
    gives the command, and the time and the result to expect. `run.name` must be the function's
    name.
    """
    REGISTERED[function.__name__] = function
    return function
