"""Reading encoders that other projects wrote: timm's and transformers' folders, Meta's files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.artifacts.key_maps import from_meta, from_transformers, from_vjepa2
from models.encoders.blocks import LN_EPS
from models.encoders.vit import PRESETS
from models.media.preprocessing import RESAMPLING, Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt")
# IJepaConfig's own, for files that leave them out.
IJEPA_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "qkv_bias": True,
}
# VJEPA2Config's own.
VJEPA2_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_ratio": 4.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "crop_size": 256,
    "patch_size": 16,
    "frames_per_clip": 64,
    "tubelet_size": 2,
    "in_chans": 3,
    "qkv_bias": True,
    "pred_hidden_size": 384,
    "pred_num_attention_heads": 12,
    "pred_num_hidden_layers": 12,
    "pred_num_mask_tokens": 10,
    "pred_mlp_ratio": 4.0,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read: enough to build our encoder."""

    shape: dict[str, Any]
    """Arguments of `models.encoders.vit.VisionTransformer` (or of `models.encoders.predictor.Predictor`)."""
    preprocessing: Preprocessing
    state: dict[str, Tensor]
    """Under our names."""
    layer_norm_eps: float = LN_EPS


def read_state(folder: Path, source: str) -> dict[str, Tensor]:
    """Reads a folder's safetensors, sharded or not.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{source}: no model.safetensors")
    return {k: v for file in files for k, v in load_file(file).items()}


def read_timm(folder: Path, config: Mapping[str, Any], uri: str) -> Source:
    """Reads a timm model folder; a classification head is left behind.

    Raises:
        ValueError: not a ViT that ours reproduces, with what it lacks.
    """
    shape = _timm_shape(config, uri)
    cfg = config.get("pretrained_cfg", config)
    prep = Preprocessing(
        image_size=shape["image_size"],
        mean=tuple(cfg.get("mean", IMAGENET_MEAN)),
        std=tuple(cfg.get("std", IMAGENET_STD)),
        interpolation=cfg.get("interpolation", "bicubic"),
        crop_fraction=cfg.get("crop_pct", 1.0),
    )
    state = {k: v for k, v in read_state(folder, uri).items() if not k.startswith("head.")}
    return Source(shape, prep, state)


def _timm_shape(config: Mapping[str, Any], uri: str) -> dict[str, Any]:
    """Reads the shape off timm's own model, built without memory; refuses what we cannot run."""
    arguments = {"num_classes": 0, **config.get("model_args", {})}
    with torch.device("meta"):
        model: Any = timm.create_model(config["architecture"], pretrained=False, **arguments)
    if not isinstance(model, timm.models.VisionTransformer):
        raise ValueError(f"{uri}: {config['architecture']} is not a vision transformer")
    block: Any = model.blocks[0]
    wanted = {
        "without class and register tokens": model.num_prefix_tokens == 0,
        "mean pooled": model.global_pool == "avg" and isinstance(model.fc_norm, nn.Identity),
        "with exact GELU": getattr(block.mlp.act, "approximate", "") == "none",
        f"with LayerNorm eps {LN_EPS}": getattr(model.norm, "eps", None) == LN_EPS,
        "square": model.patch_embed.grid_size[0] == model.patch_embed.grid_size[1],
    }
    lacking = [name for name, true in wanted.items() if not true]
    if lacking:
        raise ValueError(f"{uri}: {config['architecture']} is not {', not '.join(lacking)}")
    patch = model.patch_embed.patch_size[0]
    return {
        "image_size": model.patch_embed.grid_size[0] * patch,
        "patch_size": patch,
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
    }


def read_transformers(folder: Path, config: Mapping[str, Any], uri: str) -> Source:
    """Reads a folder of `transformers.IJepaModel` or `IJepaForImageClassification`.

    Raises:
        ValueError: an activation other than exact GELU, or no qkv bias.
    """
    c: dict[str, Any] = IJEPA_DEFAULTS | dict(config)
    if c["hidden_act"] != "gelu" or not c["qkv_bias"]:
        found = f"{c['hidden_act']} and {c['qkv_bias']}"
        raise ValueError(f"{uri}: needs hidden_act gelu and qkv_bias true, has {found}")
    shape = {
        "image_size": c["image_size"],
        "patch_size": c["patch_size"],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp_ratio": c["intermediate_size"] / c["hidden_size"],
    }
    prep = _processor(folder / "preprocessor_config.json", c["image_size"])
    return Source(shape, prep, from_transformers(read_state(folder, uri)), c["layer_norm_eps"])


def read_vjepa2(folder: Path, config: Mapping[str, Any], uri: str) -> Source:
    """Reads the encoder of a `transformers.VJEPA2Model` or `VJEPA2ForVideoClassification` folder.

    Raises:
        ValueError: an activation other than exact GELU, no qkv bias, or not three channels.
    """
    c = _vjepa2_settings(config, uri)
    shape = {
        "image_size": c["crop_size"],
        "patch_size": c["patch_size"],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp_ratio": c["mlp_ratio"],
        "frames": c["frames_per_clip"],
        "tubelet": c["tubelet_size"],
        "positions": "rope_released",
    }
    prep = _processor(folder / "video_preprocessor_config.json", c["crop_size"], "bilinear")
    encoder, _ = from_vjepa2(read_state(folder, uri))
    return Source(shape, prep, encoder, c["layer_norm_eps"])


def read_vjepa2_predictor(folder: Path, config: Mapping[str, Any], uri: str) -> Source:
    """Reads the predictor of a `transformers.VJEPA2Model` folder.

    Raises:
        ValueError: as `read_vjepa2`, or no predictor in it.
    """
    c = _vjepa2_settings(config, uri)
    _, predictor = from_vjepa2(read_state(folder, uri))
    if not predictor:
        raise ValueError(f"{uri}: this VJEPA2Model has no predictor weights")
    shape = {
        "grid": c["crop_size"] // c["patch_size"],
        "encoder_width": c["hidden_size"],
        "width": c["pred_hidden_size"],
        "depth": c["pred_num_hidden_layers"],
        "heads": c["pred_num_attention_heads"],
        "mlp_ratio": c["pred_mlp_ratio"],
        "tubes": c["frames_per_clip"] // c["tubelet_size"],
        "positions": "rope_released",
        "mask_tokens": c["pred_num_mask_tokens"],
    }
    prep = _processor(folder / "video_preprocessor_config.json", c["crop_size"], "bilinear")
    return Source(shape, prep, predictor, c["layer_norm_eps"])


def _vjepa2_settings(config: Mapping[str, Any], uri: str) -> dict[str, Any]:
    c: dict[str, Any] = VJEPA2_DEFAULTS | dict(config)
    if (c["hidden_act"], c["qkv_bias"], c["in_chans"]) != ("gelu", True, 3):
        found = f"{c['hidden_act']}, {c['qkv_bias']} and {c['in_chans']}"
        raise ValueError(f"{uri}: needs hidden_act gelu, qkv_bias true, in_chans 3, has {found}")
    return c


def _processor(path: Path, image_size: int, resampling: str = "bicubic") -> Preprocessing:
    c = json.loads(path.read_text()) if path.is_file() else {}
    names = {int(v): k for k, v in RESAMPLING.items()}
    # ViT's processor gives height and width instead: it squashes; we crop the centre.
    short_side = c.get("size", {}).get("shortest_edge", image_size)
    return Preprocessing(
        image_size=image_size,
        mean=tuple(c.get("image_mean", IMAGENET_MEAN)),
        std=tuple(c.get("image_std", IMAGENET_STD)),
        interpolation=names[c.get("resample", int(RESAMPLING[resampling]))],
        crop_fraction=min(1.0, image_size / short_side),
    )


def read_meta(path: Path, uri: str) -> Source:
    """Reads a released I-JEPA checkpoint file: its target encoder.

    Raises:
        ValueError: another kind of file, or a width and depth that no preset has.
    """
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"{uri}: expected a folder, or a file ending {CHECKPOINT_SUFFIXES}")
    state = from_meta(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    absent = {"pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} - state.keys()
    if absent:
        raise ValueError(f"{uri}: not a ViT of ours: missing {', '.join(sorted(absent))}")
    _, num_patches, width = state["pos_embed"].shape
    patch = state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    # The one number that the weights do not show; V-JEPA 2's giant has others.
    images = [p for name, p in PRESETS.items() if name.startswith("vit_")]
    heads = {(p.width, p.depth): p.heads for p in images}.get((width, depth))
    if heads is None:
        raise ValueError(f"{uri}: no preset is {width} wide and {depth} deep; heads unknown")
    size = math.isqrt(num_patches) * patch
    shape = {
        "image_size": size,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    return Source(
        shape, Preprocessing(image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD), state
    )
