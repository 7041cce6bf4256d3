"""Builds an encoder and a predictor from the model settings of a run.

The settings are a mapping with the fields of `pipelines.config.train.ModelConfig`, as stored in
JSON. Fields that are missing because the run is older than the field get their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.encoders.predictor import Predictor
from models.encoders.shape import EncoderShape, find_preset
from models.encoders.vit import VisionTransformer

Settings = Mapping[str, Any]


def encoder_from_settings(model: Settings) -> VisionTransformer:
    """Builds the encoder with fresh weights.

    Raises:
        ValueError: the preset does not exist, or the sizes are incompatible.
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
    """Builds the predictor for an encoder, with fresh weights.

    Width and depth are taken from the settings, or from the encoder's preset where the settings
    give none. The keyword arguments are those of `Predictor`.

    Raises:
        ValueError: the preset does not exist, or the width does not suit the positions.
    """
    preset = find_preset(model["encoder"])
    return Predictor(
        grid=encoder.grid,
        encoder_width=encoder.width,
        width=model["predictor_width"] or preset.predictor_width,
        depth=model["predictor_depth"] or preset.predictor_depth,
        heads=preset.predictor_heads,
        positions=encoder.positions,
        mask_tokens=mask_tokens,
        zero_mask_tokens=zero_mask_tokens,
        output_width=output_width,
        init=encoder.shape.init,
        pool_context=model.get("predictor_input", "tokens") == "mean",
        activation_checkpointing=encoder.activation_checkpointing,
    )
