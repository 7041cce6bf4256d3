"""`transformers.VJEPA2Model`: an encoder of clips with rotary positions, and a predictor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.artifacts.formats.format import Export, Format, Source, Stored, write_json
from models.artifacts.formats.key_maps import StateDict, fuse_qkv, rename, split_qkv
from models.artifacts.formats.processors import (
    no_processor,
    read_processor,
    video_processor_config,
    without_processor,
)
from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer
from models.image_size import Grid, size_text
from models.tensor_files import METADATA, detached, read_tensors, save_tensors

PROCESSOR = "video_preprocessor_config.json"
# Defaults of VJEPA2Config, for files that leave them out.
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
# Rules of both the encoder and the predictor, for names without `encoder.` or `predictor.`.
_TO_VJEPA2 = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.proj."),
    (r"^embed\.", "embeddings.predictor_embeddings."),
    (r"^mask_token$", "embeddings.mask_tokens"),
    (r"^blocks\.(\d+)\.attn\.", r"blocks.\1.attention."),
    (r"^blocks\.", "layer."),
    (r"^norm\.", "layernorm."),
)
_FROM_VJEPA2 = (
    (r"^embeddings\.patch_embeddings\.proj\.", "patch_embed.proj."),
    (r"^embeddings\.predictor_embeddings\.", "embed."),
    (r"^embeddings\.mask_tokens$", "mask_token"),
    (r"^layer\.(\d+)\.attention\.", r"layer.\1.attn."),
    (r"^layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
)


def read_vjepa2(stored: Stored) -> Source:
    """Reads the encoder of a `transformers.VJEPA2Model` or `VJEPA2ForVideoClassification` folder.

    Raises:
        ValueError: the activation is not exact GELU, there is no qkv bias, or not three channels.
    """
    c = _settings(stored)
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
    encoder, _ = from_vjepa2(read_tensors(stored.path, stored.uri))
    return _source(stored, c, shape, encoder)


def read_predictor(stored: Stored) -> Source:
    """Reads the predictor of a `transformers.VJEPA2Model` folder.

    Raises:
        ValueError: as for `read_vjepa2`, or there is no predictor.
    """
    c = _settings(stored)
    _, predictor = from_vjepa2(read_tensors(stored.path, stored.uri))
    if not predictor:
        raise ValueError(f"{stored.uri}: this VJEPA2Model has no predictor weights")
    side = c["crop_size"] // c["patch_size"]
    shape = {
        "grid": Grid(side, side, c["frames_per_clip"] // c["tubelet_size"]),
        "encoder_width": c["hidden_size"],
        "width": c["pred_hidden_size"],
        "depth": c["pred_num_hidden_layers"],
        "heads": c["pred_num_attention_heads"],
        "mlp_ratio": c["pred_mlp_ratio"],
        "positions": "rope_released",
        "mask_tokens": c["pred_num_mask_tokens"],
    }
    return _source(stored, c, shape, predictor)


def _source(
    stored: Stored, settings: dict[str, Any], shape: dict[str, Any], state: StateDict
) -> Source:
    processor, side = stored.path / PROCESSOR, settings["crop_size"]
    return Source(
        shape=shape,
        preprocessing=read_processor(processor, side, "bilinear"),
        state=state,
        layer_norm_eps=settings["layer_norm_eps"],
    )


def _settings(stored: Stored) -> dict[str, Any]:
    c: dict[str, Any] = VJEPA2_DEFAULTS | dict(stored.config)
    if (c["hidden_act"], c["qkv_bias"], c["in_chans"]) != ("gelu", True, 3):
        found = f"{c['hidden_act']}, {c['qkv_bias']} and {c['in_chans']}"
        raise ValueError(
            f"{stored.uri}: needs hidden_act gelu, qkv_bias true, in_chans 3, has {found}"
        )
    return c


def vjepa2_config(encoder: VisionTransformer, predictor: Predictor | None) -> dict[str, Any]:
    """Returns the config.json of a `VJEPA2Model`; None gives a predictor without layers."""
    config = {
        "model_type": "vjepa2",
        "architectures": ["VJEPA2Model"],
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm.eps,
        "crop_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "frames_per_clip": encoder.frames,
        "tubelet_size": encoder.tubelet,
        "in_chans": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if predictor is None:
        return config | {"pred_num_hidden_layers": 0}
    return config | {
        "pred_hidden_size": predictor.embed.out_features,
        "pred_num_hidden_layers": len(predictor.blocks),
        "pred_num_attention_heads": predictor.heads,
        "pred_mlp_ratio": predictor.mlp_ratio,
        "pred_num_mask_tokens": len(predictor.mask_token),
    }


def to_vjepa2(
    encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor] | None = None
) -> StateDict:
    """Renames an encoder's weights, and a predictor's, for `transformers.VJEPA2Model`."""
    renamed: StateDict = {}
    for part, state in (("encoder", encoder), ("predictor", predictor or {})):
        for name, value in split_qkv(state).items():
            if name == "mask_token":
                value = value[:, None]  # [G, 1, P] to [G, 1, 1, P]
            if name == "patch_embed.proj.weight" and value.ndim == 4:
                value = value[:, :, None]  # a tubelet of one frame
            renamed[f"{part}.{rename(name, _TO_VJEPA2)}"] = value
    return renamed


def from_vjepa2(state: Mapping[str, Tensor]) -> tuple[StateDict, StateDict]:
    """Splits a `VJEPA2Model`'s weights into the encoder's and the predictor's, under our names.

    The pooler and classifier of `VJEPA2ForVideoClassification` are dropped. Any other unknown name
    stays with the encoder's, so that `load_strict` reports it.
    """
    parts: dict[str, StateDict] = {"encoder": {}, "predictor": {}}
    for name, value in state.items():
        name = name.removeprefix("vjepa2.")
        part, _, rest = name.partition(".")
        if part in ("pooler", "classifier"):
            continue
        ours = rename(rest, _FROM_VJEPA2) if part in parts else name
        if ours == "mask_token":
            value = value[:, 0]
        if ours == "patch_embed.proj.weight" and value.shape[2] == 1:
            value = value[:, :, 0]
        parts.get(part, parts["encoder"])[ours] = value
    return fuse_qkv(parts["encoder"]), fuse_qkv(parts["predictor"])


def _write(folder: Path, export: Export) -> None:
    folder = folder / "transformers"
    folder.mkdir()
    predictor = detached(export.predictor) if export.predictor else None
    state = to_vjepa2(detached(export.encoder), predictor)
    save_tensors(state, folder / "model.safetensors", METADATA)
    write_json(folder / "config.json", vjepa2_config(export.encoder, export.predictor))
    if no_processor(export.preprocessing) is None:
        write_json(folder / PROCESSOR, video_processor_config(export.preprocessing))


def _can_write(encoder: VisionTransformer) -> bool:
    return encoder.positions == "rope_released" and isinstance(encoder.image_size, int)


def _limits(export: Export) -> list[str]:
    encoder = export.encoder
    if _can_write(encoder):
        return without_processor(PROCESSOR, export.preprocessing)
    if encoder.positions != "rope_released":
        return []
    size = size_text(encoder.image_size)
    return [f"transformers/ is not written: a VJEPA2Model takes squares, not {size}"]


TRANSFORMERS_VJEPA2 = Format(
    name="transformers.VJEPA2Model",
    recognises=lambda stored: stored.config.get("model_type") == "vjepa2",
    read=read_vjepa2,
    read_predictor=read_predictor,
    can_write=_can_write,
    write=_write,
    limits=_limits,
)
