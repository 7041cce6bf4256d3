"""The objectives: one file each, one row each in `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.encoders.predictor import Predictor
from models.encoders.shape import EncoderShape, find_preset
from models.encoders.vit import VisionTransformer
from models.objectives.dmjd import DMJD
from models.objectives.ijepa import IJEPA
from models.objectives.lejepa import LeJEPA
from models.objectives.mae import MAE, VideoMAE
from models.objectives.objective import Batch, Objective, Output
from models.objectives.regularized import Regularized
from models.objectives.sigreg import SIGReg
from models.objectives.vicreg import VICReg
from models.objectives.vjepa import VJEPA
from models.views import Views

__all__ = ["OBJECTIVES", "Batch", "Objective", "Output", "build_objective", "find_objective"]

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


def _build_dmjd(model: Settings, objective: Settings) -> Objective:
    encoder = _build_encoder(model)
    predictor = _build_predictor(model, encoder)
    return DMJD(encoder, predictor, **_latent_settings(model, objective))


def _build_mae(model: Settings, objective: Settings, kind: type[MAE] = MAE) -> Objective:
    encoder = _build_encoder(model)
    pixels = 3 * encoder.tubelet * encoder.patch_size**2
    decoder = _build_predictor(model, encoder, output_width=pixels)
    norm_pixels = objective["norm_pixels"]
    return kind(encoder, decoder, norm_pixels=norm_pixels, **_statistics(model))


def _build_videomae(model: Settings, objective: Settings) -> Objective:
    return _build_mae(model, objective, VideoMAE)


def _build_lejepa(model: Settings, objective: Settings, pixels: str = "images") -> Objective:
    return LeJEPA(
        _build_encoder(model),
        Views.of(objective["views"], model["image_size"]),
        _build_sigreg(objective),
        weight=objective["sigreg_weight"],
        pixels=pixels,
        projector=objective["projector"],
        **_statistics(model),
    )


def _build_levjepa(model: Settings, objective: Settings) -> Objective:
    return _build_lejepa(model, objective, "clips")


def _build_vicreg(model: Settings, objective: Settings) -> Objective:
    return VICReg(
        _build_encoder(model),
        Views.of(objective["views"], model["image_size"]),
        weights=tuple(objective["vicreg_weights"]),
        projector=objective["projector"],
        **_statistics(model),
    )


def _build_sigreg(objective: Settings) -> SIGReg:
    seed = objective.get("seed", 0)
    return SIGReg(slices=objective["slices"], knots=objective["knots"], seed=seed)


def _build_encoder(model: Settings) -> VisionTransformer:
    return VisionTransformer(
        EncoderShape.from_settings(model),
        activation_checkpointing=model.get("activation_checkpointing", False),
    )


def _build_predictor(
    model: Settings,
    encoder: VisionTransformer,
    *,
    mask_tokens: int = 1,
    zero_mask_tokens: bool = False,
    output_width: int | None = None,
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
        output_width=output_width,
        activation_checkpointing=encoder.activation_checkpointing,
    )


def _latent_settings(model: Settings, objective: Settings) -> dict[str, Any]:
    return {
        **_statistics(model),
        "loss": objective["loss"],
        "ema": tuple(objective["ema"]),
        "target": objective["target"],
    }


def _statistics(model: Settings) -> dict[str, tuple[float, ...]]:
    return {"mean": tuple(model["mean"]), "std": tuple(model["std"])}


OBJECTIVES: dict[str, Callable[[Settings, Settings], Objective]] = {
    "ijepa": _build_ijepa,
    "vjepa": _build_vjepa,
    "dmjd": _build_dmjd,
    "mae": _build_mae,
    "videomae": _build_videomae,
    "lejepa": _build_lejepa,
    "levjepa": _build_levjepa,
    "vicreg": _build_vicreg,
}


def find_objective(name: str) -> Callable[[Settings, Settings], Objective]:
    """Returns a row of `OBJECTIVES`, or a ValueError that lists them."""
    if name not in OBJECTIVES:
        raise ValueError(f"--objective.name: no {name!r}; one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def build_objective(name: str, *, model: Settings, objective: Settings) -> Objective:
    """Builds a row of `OBJECTIVES` from `PretrainConfig`'s `model_settings` and `objective_settings`.

    Raises:
        ValueError: no such objective or preset.
    """
    built = find_objective(name)(model, objective)
    on = objective.get("regularize")
    if on is None:
        return built
    weight = objective["regularizer_weight"]
    return Regularized(built, _build_sigreg(objective), weight=weight, on=on)
