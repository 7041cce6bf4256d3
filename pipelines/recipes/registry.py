"""All recipes by name, collected from the modules of this folder.

To add a recipe, write a function with `@recipe` in a module of this folder. A variant of a recipe
calls the other recipe and replaces fields. Recipes without a measured result say "not run".
"""

from __future__ import annotations

import importlib
import pkgutil

import pipelines.recipes
from pipelines.config.train import PretrainConfig
from pipelines.recipes.recipe import REGISTERED


def _load() -> dict[str, tuple[str, PretrainConfig]]:
    for module in pkgutil.iter_modules(pipelines.recipes.__path__, "pipelines.recipes."):
        if module.name != __name__:
            importlib.import_module(module.name)
    return {
        name: ((function.__doc__ or "").partition("\n")[0], function())
        for name, function in REGISTERED.items()
    }


RECIPES: dict[str, tuple[str, PretrainConfig]] = _load()
"""The subcommands of `python -m pipelines.pretrain`: (one-line description, configuration)."""
