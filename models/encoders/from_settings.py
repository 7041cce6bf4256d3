"""Encoder and predictor from a run's model settings.

The settings are a mapping with the fields of `pipelines.config.train.ModelConfig`, as JSON holds
them. Fields that came later than some old runs are read with their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.encoders.predictor import Predictor
from models.encoders.shape import EncoderShape, find_preset
from models.encoders.vit import VisionTransformer

Settings = Mapping[str, Any]


def encoder_from_settings(model: Settings) -> VisionTransformer:
    """Builds the encoder.

    Raises:
        ValueError: there is no such preset, or the sizes do not fit.
    """
    return VisionTransformer(
        EncoderShape.from_settings(model),
        activation_checkpointing=model.get("activation_checkpointing", False),
    )


def predictor_from_settings(
    model: Settings,
    encoder: VisionTransformer,
    *,
    mask_tokens: int = 1,
    zero_mask_tokens: bool = False,
    output_width: int | None = None,
) -> Predictor:
    """Builds the predictor that goes with an encoder; the other arguments are `Predictor`'s."""
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
