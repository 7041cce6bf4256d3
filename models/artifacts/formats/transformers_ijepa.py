"""`transformers.IJepaModel`: an encoder of images with sine and cosine positions.

Query, key and value are separate there. Files have the original names
(`encoder.layer.N.attention.attention.query`); transformers 5 has newer ones in memory
(`layers.N.attention.q_proj`). Both are read. The original names are written, because every version
reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.artifacts.formats.format import Export, Format, Source, Stored, write_json
from models.artifacts.formats.key_maps import StateDict, fuse_qkv, rename, split_qkv
from models.artifacts.formats.processors import (
    no_processor,
    processor_config,
    read_processor,
    without_processor,
)
from models.encoders.vit import VisionTransformer
from models.image_size import as_image_size, height_width
from models.tensor_files import METADATA, detached, read_tensors, save_tensors

PROCESSOR = "preprocessor_config.json"
# Defaults of IJepaConfig, for files that leave them out.
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
_TO_TRANSFORMERS = (
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layer.\1.attention.attention."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
)
_FROM_TRANSFORMERS = (
    (r"^(ijepa\.)", ""),  # the backbone of IJepaForImageClassification
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.query."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.key."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def read_ijepa(stored: Stored) -> Source:
    """Reads a folder of `transformers.IJepaModel` or `IJepaForImageClassification`.

    Raises:
        ValueError: the activation is not exact GELU, or there is no qkv bias.
    """
    c: dict[str, Any] = IJEPA_DEFAULTS | dict(stored.config)
    if c["hidden_act"] != "gelu" or not c["qkv_bias"]:
        found = f"{c['hidden_act']} and {c['qkv_bias']}"
        raise ValueError(f"{stored.uri}: needs hidden_act gelu and qkv_bias true, has {found}")
    shape = {
        "image_size": as_image_size(c["image_size"]),
        "patch_size": c["patch_size"],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "mlp_ratio": c["intermediate_size"] / c["hidden_size"],
    }
    prep = read_processor(stored.path / PROCESSOR, as_image_size(c["image_size"]))
    return Source(
        shape=shape,
        preprocessing=prep,
        state=from_ijepa(read_tensors(stored.path, stored.uri)),
        layer_norm_eps=c["layer_norm_eps"],
    )


def ijepa_config(encoder: VisionTransformer) -> dict[str, Any]:
    """Returns the config.json of a `transformers.IJepaModel`."""
    return {
        "model_type": "ijepa",
        "architectures": ["IJepaModel"],
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.state_dict()["blocks.0.mlp.fc1.bias"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": encoder.norm.eps,
        "image_size": _size(encoder),
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def _size(encoder: VisionTransformer) -> int | list[int]:
    size = encoder.image_size
    return size if isinstance(size, int) else list(height_width(size))


def to_ijepa(state: Mapping[str, Tensor]) -> StateDict:
    """Renames our weights for `transformers.IJepaModel` and splits every fused qkv in three."""
    return {rename(name, _TO_TRANSFORMERS): v for name, v in split_qkv(state).items()}


def from_ijepa(state: Mapping[str, Tensor]) -> StateDict:
    """Renames the weights of an `IJepaModel` to ours and fuses query, key and value.

    A classifier is dropped. Any other unknown name is kept, so that `load_strict` reports it.
    """
    kept = {name: v for name, v in state.items() if not name.startswith("classifier.")}
    return fuse_qkv({rename(name, _FROM_TRANSFORMERS): v for name, v in kept.items()})


def _write(folder: Path, export: Export) -> None:
    folder = folder / "transformers"
    folder.mkdir()
    save_tensors(to_ijepa(detached(export.encoder)), folder / "model.safetensors", METADATA)
    write_json(folder / "config.json", ijepa_config(export.encoder))
    if no_processor(export.preprocessing) is None:
        write_json(folder / PROCESSOR, processor_config(export.preprocessing))


def _can_write(encoder: VisionTransformer) -> bool:
    return encoder.frames == 1 and encoder.positions == "sincos"


def _limits(export: Export) -> list[str]:
    written = _can_write(export.encoder)
    return without_processor(PROCESSOR, export.preprocessing) if written else []


TRANSFORMERS_IJEPA = Format(
    name="transformers.IJepaModel",
    recognises=lambda stored: stored.config.get("model_type") == "ijepa",
    read=read_ijepa,
    can_write=_can_write,
    write=_write,
    limits=_limits,
)
