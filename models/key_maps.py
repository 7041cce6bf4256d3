"""Names of the same weights in other people's checkpoints, and back.

Our names are timm's: `patch_embed.proj`, `pos_embed`, `blocks.N.*`, `norm`. Foreign ones:

- transformers' `IJepaModel` splits the fused qkv; files carry the original names
  (`encoder.layer.N.attention.attention.query`), transformers 5 holds newer ones in memory
  (`layers.N.attention.q_proj`). Both are read, the original is written: every version reads it.
- Meta's released checkpoints are training states: a dict with `encoder` and `target_encoder`, whose
  names are timm's behind `module.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

_QKV = ("query", "key", "value")
_TO_TRANSFORMERS = (
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
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


def to_transformers(state: Mapping[str, Tensor]) -> StateDict:
    """Renames our weights for `transformers.IJepaModel`, splitting every fused qkv in three."""
    renamed: StateDict = {}
    for name, value in state.items():
        fused = re.match(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name)
        if fused is None:
            renamed[_rename(name, _TO_TRANSFORMERS)] = value
            continue
        layer, kind = fused.groups()
        for part, third in zip(_QKV, value.chunk(3), strict=True):
            key = f"encoder.layer.{layer}.attention.attention.{part}.{kind}"
            renamed[key] = third.contiguous()
    return renamed


def from_transformers(state: Mapping[str, Tensor]) -> StateDict:
    """Renames `IJepaModel`'s weights to ours, fusing query, key and value.

    A classifier on top is dropped; any other foreign name is kept, for the loader to report.
    """
    renamed: StateDict = {}
    for name, value in state.items():
        if not name.startswith("classifier."):
            renamed[_rename(name, _FROM_TRANSFORMERS)] = value
    for name in [n for n in renamed if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in _QKV]
        if all(part in renamed for part in parts):
            fused = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".query.", ".qkv.")] = fused
    return renamed


def from_meta(checkpoint: Mapping[str, Any]) -> StateDict:
    """Picks the target encoder (else the encoder) out of a released I-JEPA training state.

    Raises:
        ValueError: the checkpoint holds neither.
    """
    for part in ("target_encoder", "encoder"):
        if isinstance(checkpoint.get(part), Mapping):
            return {k.removeprefix("module."): v for k, v in checkpoint[part].items()}
    found = sorted(map(str, checkpoint))[:8]
    raise ValueError(f"no target_encoder or encoder in this checkpoint, only {found}")


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
