"""The registry of objectives. Each is registered where it is defined, by `@register_objective`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from models.encoders.from_settings import Settings
from models.objectives.objective import Objective, RegisteredObjective
from models.objectives.sigreg import Regularized, sigreg_from_settings

PACKAGES = ("models.objectives", "models.planning.world_model")
"""Where objectives are defined; named, because planning stands above this package."""

_REGISTERED: dict[str, type[RegisteredObjective]] = {}

C = TypeVar("C", bound=type[RegisteredObjective])


def register_objective(name: str) -> Callable[[C], C]:
    """Registers a class under a name, which `--objective.name` then accepts."""

    def enter(objective: C) -> C:
        _REGISTERED[name] = objective
        return objective

    return enter


@cache
def objectives() -> dict[str, type[RegisteredObjective]]:
    """Returns all objectives by name; the first call imports every module of `PACKAGES`."""
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def find_objective(name: str) -> type[RegisteredObjective]:
    """Returns the objective class registered under a name.

    Raises:
        ValueError: the name is not registered; the message lists all names.
    """
    found = objectives().get(name)
    if found is None:
        raise ValueError(f"--objective.name: no {name!r}; one of {', '.join(objectives())}")
    return found


def build_objective(name: str, *, model: Settings, objective: Settings) -> Objective:
    """Builds an objective, with SIGReg added to its loss if the settings ask for it.

    Args:
        name: registered name.
        model: `PretrainConfig.model_settings`.
        objective: `PretrainConfig.objective_settings`.

    Raises:
        ValueError: the objective or the preset does not exist, or the settings are incompatible.
    """
    built = find_objective(name).from_settings(model, objective)
    on = objective.get("regularize")
    if on is None:
        return built
    weight = objective["regularizer_weight"]
    return Regularized(built, sigreg_from_settings(objective), weight=weight, on=on)
