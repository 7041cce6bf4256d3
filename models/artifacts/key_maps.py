"""Names of the same weights in other people's checkpoints, and back.

Our names are timm's: `patch_embed.proj`, `pos_embed`, `blocks.N.*`, `norm`. Foreign ones:

- transformers' `IJepaModel` splits the fused qkv; files carry the original names
  (`encoder.layer.N.attention.attention.query`), transformers 5 holds newer ones in memory
  (`layers.N.attention.q_proj`). Both are read, the original is written: every version reads it.
- transformers' `VJEPA2Model` holds an encoder and a predictor, qkv split in both.
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
# Encoder and predictor, behind `encoder.` and `predictor.`.
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


def to_transformers(state: Mapping[str, Tensor]) -> StateDict:
    """Renames our weights for `transformers.IJepaModel`, splitting every fused qkv in three."""
    return {_rename(name, _TO_TRANSFORMERS): v for name, v in _split_qkv(state).items()}


def from_transformers(state: Mapping[str, Tensor]) -> StateDict:
    """Renames `IJepaModel`'s weights to ours, fusing query, key and value.

    A classifier on top is dropped; any other foreign name is kept, for the loader to report.
    """
    kept = {name: v for name, v in state.items() if not name.startswith("classifier.")}
    return _fuse_qkv({_rename(name, _FROM_TRANSFORMERS): v for name, v in kept.items()})


def to_vjepa2(
    encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor] | None = None
) -> StateDict:
    """Renames an encoder's weights, and a predictor's, for `transformers.VJEPA2Model`."""
    renamed: StateDict = {}
    for part, state in (("encoder", encoder), ("predictor", predictor or {})):
        for name, value in _split_qkv(state).items():
            if name == "mask_token":
                value = value[:, None]  # [G, 1, P] to [G, 1, 1, P]
            if name == "patch_embed.proj.weight" and value.ndim == 4:
                value = value[:, :, None]  # a tubelet of one frame
            renamed[f"{part}.{_rename(name, _TO_VJEPA2)}"] = value
    return renamed


def from_vjepa2(state: Mapping[str, Tensor]) -> tuple[StateDict, StateDict]:
    """Splits `VJEPA2Model`'s weights in the encoder's and the predictor's, under our names.

    The pooler and classifier of `VJEPA2ForVideoClassification` are dropped; any other foreign name
    stays with the encoder's, for the loader to report.
    """
    parts: dict[str, StateDict] = {"encoder": {}, "predictor": {}}
    for name, value in state.items():
        name = name.removeprefix("vjepa2.")
        part, _, rest = name.partition(".")
        if part in ("pooler", "classifier"):
            continue
        ours = _rename(rest, _FROM_VJEPA2) if part in parts else name
        if ours == "mask_token":
            value = value[:, 0]
        if ours == "patch_embed.proj.weight" and value.shape[2] == 1:
            value = value[:, :, 0]
        parts.get(part, parts["encoder"])[ours] = value
    return _fuse_qkv(parts["encoder"]), _fuse_qkv(parts["predictor"])


def _split_qkv(state: Mapping[str, Tensor]) -> StateDict:
    """`attn.qkv` to `attn.query`, `attn.key` and `attn.value`."""
    split: StateDict = {}
    for name, value in state.items():
        if ".attn.qkv." not in name:
            split[name] = value
            continue
        for part, third in zip(_QKV, value.chunk(3), strict=True):
            split[name.replace(".qkv.", f".{part}.")] = third.contiguous()
    return split


def _fuse_qkv(state: StateDict) -> StateDict:
    """The inverse of `_split_qkv`; an incomplete triple is left as it is."""
    fused = dict(state)
    for name in [n for n in fused if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in _QKV]
        if all(part in fused for part in parts):
            whole = torch.cat([fused.pop(part) for part in parts])
            fused[name.replace(".query.", ".qkv.")] = whole
    return fused


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
