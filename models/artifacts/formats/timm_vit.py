"""timm's vision transformers without class token, as stored on the hub.

Our weights have timm's names, so an artifact is also a timm model once its config.json has timm's
keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.artifacts.formats.format import Export, Format, Source, Stored, write_json
from models.artifacts.formats.processors import IMAGENET_MEAN, IMAGENET_STD
from models.encoders import timm_parts
from models.encoders.blocks import LN_EPS
from models.encoders.vit import VisionTransformer
from models.image_size import ImageSize, height_width, image_size
from models.media.fit import Fit
from models.media.preprocessing import Preprocessing
from models.tensor_files import read_tensors

# timm's names of these shapes. Any other shape goes under the default name, with its arguments
# spelt out, which timm applies on top.
TIMM_DEFAULT = "vit_base_patch16_gap_224"
TIMM_NAMES: dict[tuple[int, int, int, ImageSize], str] = {
    (1280, 32, 14, 224): "vit_huge_patch14_gap_224",
    (1280, 32, 16, 448): "vit_huge_patch16_gap_448",
    (1408, 40, 16, 224): "vit_giant_patch16_gap_224",
}


CROP_MODES: dict[Fit, str] = {"crop": "center", "pad": "border", "squash": "squash"}
"""timm's `crop_mode` of its evaluation transform. It has none for `whole`."""


def read_timm(stored: Stored) -> Source:
    """Reads a timm model folder, without its classification head.

    Raises:
        ValueError: it is not a ViT that ours can reproduce; the differences are named.
    """
    shape = _timm_shape(stored.config, stored.uri)
    cfg = stored.config.get("pretrained_cfg", stored.config)
    prep = Preprocessing(
        image_size=shape["image_size"],
        mean=tuple(cfg.get("mean", IMAGENET_MEAN)),
        std=tuple(cfg.get("std", IMAGENET_STD)),
        interpolation=cfg.get("interpolation", "bicubic"),
        crop_fraction=cfg.get("crop_pct", 1.0),
        fit=_fit_of(cfg.get("crop_mode") or "center", stored.uri),
    )
    state = read_tensors(stored.path, stored.uri)
    state = {k: v for k, v in state.items() if not k.startswith("head.")}
    return Source(shape=shape, preprocessing=prep, state=state)


def _fit_of(crop_mode: str, uri: str) -> Fit:
    found: list[Fit] = [fit for fit, mode in CROP_MODES.items() if mode == crop_mode]
    if not found:
        raise ValueError(f"{uri}: crop_mode {crop_mode!r} is none of {list(CROP_MODES.values())}")
    return found[0]


def _timm_shape(config: Mapping[str, Any], uri: str) -> dict[str, Any]:
    """Takes the shape from timm's model, built on the meta device; refuses what we cannot run."""
    arguments = {"num_classes": 0, **config.get("model_args", {})}
    with torch.device("meta"):
        model: Any = timm_parts.create_model(config["architecture"], pretrained=False, **arguments)
    if not isinstance(model, timm_parts.VisionTransformer):
        raise ValueError(f"{uri}: {config['architecture']} is not a vision transformer")
    block: Any = model.blocks[0]
    wanted = {
        "without class and register tokens": model.num_prefix_tokens == 0,
        "mean pooled": model.global_pool == "avg" and isinstance(model.fc_norm, nn.Identity),
        "with exact GELU": getattr(block.mlp.act, "approximate", "") == "none",
        f"with LayerNorm eps {LN_EPS}": getattr(model.norm, "eps", None) == LN_EPS,
        "with square patches": len(set(model.patch_embed.patch_size)) == 1,
    }
    lacking = [name for name, true in wanted.items() if not true]
    if lacking:
        raise ValueError(f"{uri}: {config['architecture']} is not {', not '.join(lacking)}")
    patch, (rows, columns) = model.patch_embed.patch_size[0], model.patch_embed.grid_size
    return {
        "image_size": image_size(rows * patch, columns * patch),
        "patch_size": patch,
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
    }


def timm_config(encoder: VisionTransformer, prep: Preprocessing) -> dict[str, Any]:
    """Returns the config.json of a timm model on the hub.

    For the fit `whole` it says `squash`, which is the nearest to it on one grid.
    """
    size = encoder.image_size
    key = (encoder.width, encoder.depth, encoder.patch_size, size)
    return {
        "architecture": TIMM_NAMES.get(key, TIMM_DEFAULT),
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": size,
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": encoder.mlp_ratio,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, *height_width(size)],
            "fixed_input_size": True,
            "interpolation": prep.interpolation,
            "crop_pct": prep.crop_fraction,
            "crop_mode": CROP_MODES.get(prep.fit, "squash"),
            "mean": list(prep.mean),
            "std": list(prep.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _can_write(encoder: VisionTransformer) -> bool:
    return encoder.frames == 1 and encoder.positions == "sincos"


def _limits(export: Export) -> list[str]:
    prep, lines = export.preprocessing, []
    if not _can_write(export.encoder):
        return []
    if prep.fit == "whole":
        lines.append("timm's transform squashes pictures to one size: it has no fit whole")
    if prep.exclude:
        lines.append("timm computes the tokens of all regions: it leaves none out")
    return lines


def _write(folder: Path, export: Export) -> None:
    """Adds timm's keys to the config.json that our own format has written."""
    ours = json.loads((folder / "config.json").read_text())
    config = timm_config(export.encoder, export.preprocessing)
    write_json(folder / "config.json", config | ours)


TIMM_VIT = Format(
    name="timm vision transformer",
    recognises=lambda stored: "architecture" in stored.config,
    read=read_timm,
    can_write=_can_write,
    write=_write,
    limits=_limits,
)
