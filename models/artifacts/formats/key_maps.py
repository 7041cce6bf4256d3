"""Renaming weights between our names and other projects'.

Our names are timm's: `patch_embed.proj`, `pos_embed`, `blocks.N.*`, `norm`. The rules of a format
stand in its module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]
"""Patterns and their replacements, applied in order."""

_QKV = ("query", "key", "value")


def rename(name: str, rules: Rules) -> str:
    """Applies all rules to a name."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def split_qkv(state: Mapping[str, Tensor]) -> StateDict:
    """Splits every `attn.qkv` into `attn.query`, `attn.key` and `attn.value`."""
    split: StateDict = {}
    for name, value in state.items():
        if ".attn.qkv." not in name:
            split[name] = value
            continue
        for part, third in zip(_QKV, value.chunk(3), strict=True):
            split[name.replace(".qkv.", f".{part}.")] = third.contiguous()
    return split


def fuse_qkv(state: StateDict) -> StateDict:
    """Undoes `split_qkv`; an incomplete triple is left as it is."""
    fused = dict(state)
    for name in [n for n in fused if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in _QKV]
        if all(part in fused for part in parts):
            whole = torch.cat([fused.pop(part) for part in parts])
            fused[name.replace(".query.", ".qkv.")] = whole
    return fused
