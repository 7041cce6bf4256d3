"""The part of an artifact that answers with surprise: `surprise.safetensors` beside the encoder.

It holds the context encoder, the predictor, the masks and the usual errors. The target encoder is
the artifact's own. The file is optional; without it everything else works as before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.artifacts.artifact import load_strict, local_files
from models.beliefs.expectation import Expectation, Mask, Surprise
from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer
from models.image_size import Grid
from models.tensor_files import METADATA, detached, save_tensors

FILE = "surprise.safetensors"
SCHEMA_VERSION = 2
PARTS = ("encoder", "predictor")


def save_surprise(folder: Path, surprise: Surprise) -> None:
    """Writes the file into the folder of an artifact."""
    expectation = surprise.expectation
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        weights = detached(getattr(expectation, part))
        tensors |= {f"{part}.{name}": value for name, value in weights.items()}
    tensors |= {
        "place_mean": expectation.place_mean_ND.cpu(),
        "variance": expectation.variance_D.cpu(),
        "usual": surprise.usual_N.cpu(),
    }
    for number, mask in enumerate(surprise.masks):
        # Copies, because masks may be parts of one tensor, which safetensors refuses.
        ids = {"context": mask.context_K.clone(), "hidden": mask.hidden_T.clone()}
        tensors |= {f"{name}.{number}": values for name, values in ids.items()}
    told = {
        "schema_version": SCHEMA_VERSION,
        "predictor": _shape(expectation.predictor),
        "target_norm": expectation.target_norm,
        "generators": [mask.generator for mask in surprise.masks],
    }
    save_tensors(tensors, folder / FILE, METADATA | {"rayjepa": json.dumps(told)})


def load_surprise(uri: str, target_encoder: VisionTransformer) -> Surprise | None:
    """Reads the file of an artifact.

    Args:
        uri: local or `s3://` folder of the artifact.
        target_encoder: the artifact's encoder.

    Returns:
        The measure, in eval mode on the CPU; None if the artifact has none.

    Raises:
        ValueError: the file is of another version, is not as it was saved, or does not fit.
    """
    with local_files(uri) as path:
        file = path / FILE
        if not file.is_file():
            return None
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {}).get("rayjepa", "{}"))
        version = told.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"{uri}: {FILE} of schema {version}, this code reads {SCHEMA_VERSION}")
        return _assemble(load_file(file), told, target_encoder, f"{uri.rstrip('/')}/{FILE}")


def _assemble(
    tensors: dict[str, Tensor], told: dict[str, Any], target: VisionTransformer, source: str
) -> Surprise:
    encoder = VisionTransformer(target.shape)
    shape = told["predictor"]
    predictor = Predictor(**shape | {"grid": Grid(*shape["grid"])})
    for name, module in zip(PARTS, (encoder, predictor), strict=True):
        start = f"{name}."
        state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        load_strict(module, state, source)
    expectation = Expectation(encoder, predictor, target, target_norm=told["target_norm"])
    expectation.place_mean_ND.copy_(tensors["place_mean"])
    expectation.variance_D.copy_(tensors["variance"])
    masks = [
        Mask(
            context_K=tensors[f"context.{number}"],
            hidden_T=tensors[f"hidden.{number}"],
            generator=generator,
        )
        for number, generator in enumerate(told["generators"])
    ]
    surprise = Surprise(expectation, masks)
    surprise.usual_N.copy_(tensors["usual"])
    return surprise.eval()


def _shape(predictor: Predictor) -> dict[str, Any]:
    """Returns the arguments of `Predictor` that decide its weights and what they compute."""
    return {
        "grid": list(predictor.grid),
        "encoder_width": predictor.embed.in_features,
        "width": predictor.embed.out_features,
        "depth": len(predictor.blocks),
        "heads": predictor.heads,
        "mlp_ratio": predictor.mlp_ratio,
        "positions": predictor.positions,
        "mask_tokens": len(predictor.mask_token),
        "output_width": predictor.proj.out_features,
        "pool_context": predictor.pool_context,
    }
