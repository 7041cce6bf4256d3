"""The objectives: one file each, one row each in `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.objectives.ijepa import IJEPA
from models.objectives.objective import Batch, Objective, Output
from models.objectives.vjepa import VJEPA
from models.predictor import Predictor
from models.vit import VisionTransformer, build_encoder, find_preset

__all__ = ["OBJECTIVES", "Batch", "Objective", "Output", "build_objective"]

Settings = Mapping[str, Any]


def _build_ijepa(model: Settings, objective: Settings) -> Objective:
    encoder = _build_encoder(model)
    predictor = _build_predictor(model, encoder)
    return IJEPA(encoder, predictor, **_latent_settings(model, objective))


def _build_vjepa(model: Settings, objective: Settings) -> Objective:
    encoder = _build_encoder(model)
    count = model.get("mask_tokens", 2)  # V-JEPA masks at short and at long range
    predictor = _build_predictor(model, encoder, mask_tokens=count, zero_mask_tokens=True)
    return VJEPA(encoder, predictor, **_latent_settings(model, objective))


# The fields read by `get` are absent in configurations from before there was video.


def _build_encoder(model: Settings) -> VisionTransformer:
    return build_encoder(
        model["encoder"],
        image_size=model["image_size"],
        patch_size=model["patch_size"],
        patch_std=model["patch_std"],
        frames=model.get("frames", 1),
        tubelet=model.get("tubelet", 1),
        positions=model.get("positions", "sincos"),
        activation_checkpointing=model.get("activation_checkpointing", False),
    )


def _build_predictor(
    model: Settings,
    encoder: VisionTransformer,
    *,
    mask_tokens: int = 1,
    zero_mask_tokens: bool = False,
) -> Predictor:
    preset = find_preset(model["encoder"])
    return Predictor(
        grid=encoder.grid,
        encoder_width=encoder.width,
        width=model["predictor_width"] or preset.predictor_width,
        depth=model["predictor_depth"] or preset.predictor_depth,
        heads=preset.predictor_heads,
        tubes=encoder.tubes,
        positions=encoder.positions,
        mask_tokens=mask_tokens,
        zero_mask_tokens=zero_mask_tokens,
        activation_checkpointing=encoder.activation_checkpointing,
    )


def _latent_settings(model: Settings, objective: Settings) -> dict[str, Any]:
    return {
        "mean": tuple(model["mean"]),
        "std": tuple(model["std"]),
        "loss": objective["loss"],
        "ema": tuple(objective["ema"]),
        "target": objective["target"],
    }


OBJECTIVES: dict[str, Callable[[Settings, Settings], Objective]] = {
    "ijepa": _build_ijepa,
    "vjepa": _build_vjepa,
}


def build_objective(name: str, *, model: Settings, objective: Settings) -> Objective:
    """Builds a row of `OBJECTIVES` from the fields of `ModelConfig` and `ObjectiveConfig`.

    Raises:
        ValueError: no such objective or preset.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"--objective.name: no {name!r}; one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](model, objective)
