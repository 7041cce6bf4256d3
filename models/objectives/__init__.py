"""The objectives: one file each, one row each in `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.objectives.ijepa import IJEPA
from models.objectives.objective import Batch, Objective, Output
from models.predictor import Predictor
from models.vit import build_encoder, find_preset

__all__ = ["OBJECTIVES", "Batch", "Objective", "Output", "build_objective"]

Settings = Mapping[str, Any]


def _build_ijepa(model: Settings, objective: Settings) -> Objective:
    preset = find_preset(model["encoder"])
    encoder = build_encoder(
        model["encoder"],
        image_size=model["image_size"],
        patch_size=model["patch_size"],
        patch_std=model["patch_std"],
    )
    predictor = Predictor(
        grid=encoder.grid,
        encoder_width=encoder.width,
        width=model["predictor_width"] or preset.predictor_width,
        depth=model["predictor_depth"] or preset.predictor_depth,
        heads=preset.predictor_heads,
    )
    return IJEPA(
        encoder,
        predictor,
        mean=tuple(model["mean"]),
        std=tuple(model["std"]),
        loss=objective["loss"],
        ema=tuple(objective["ema"]),
        target=objective["target"],
    )


OBJECTIVES: dict[str, Callable[[Settings, Settings], Objective]] = {"ijepa": _build_ijepa}


def build_objective(name: str, *, model: Settings, objective: Settings) -> Objective:
    """Builds a row of `OBJECTIVES` from the fields of `ModelConfig` and `ObjectiveConfig`.

    Raises:
        ValueError: no such objective or preset.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"--objective.name: no {name!r}; one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](model, objective)
