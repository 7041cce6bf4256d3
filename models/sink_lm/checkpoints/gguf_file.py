"""Reads GGUF files of the Llama family: the configuration and the weights.

The `gguf` package reads the file, one tensor at a time. transformers' own loader takes three times
as long, drops tensors whose names it does not know, and does not read the rotary scaling.
Keys and layouts: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor

from models.sink_lm.checkpoints.checkpoint import Checkpoint, errors_name
from models.sink_lm.checkpoints.gguf_grids import grid_of, has_few_bits
from models.sink_lm.network.config import LMConfig, RopeConfig, UnsupportedModel, config_from_hf
from models.sink_lm.network.int4 import Grid
from models.sink_lm.network.rope import frequencies

CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
ROPE_READ = ("rope.freq_base", "rope.dimension_count")
SCALING_KEYS = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "finetuned": "finetuned",
}
# Keys of an architecture that do not change what its decoder computes.
DESCRIPTIONS = frozenset(["vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon"])
TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Divisors of the frequencies, the only trace of Llama 3.1's scaling in a GGUF file.
FACTORS = "rope_freqs.weight"
QUERY_OR_KEY = re.compile(r".*\.self_attn\.([qk])_proj\.(weight|bias)")


def open_gguf(path: Path) -> Checkpoint:
    """Opens a `.gguf` file of architecture llama (Mistral too), qwen2 or qwen3.

    Raises:
        ValueError: names the file, which is no GGUF file, is cut off, or lacks a key of the
            configuration.
        UnsupportedModel: names the file and what cannot stream.
    """
    with errors_name(path):
        reader = GGUFReader(path)
        fields = _fields(reader)
        tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        factors = tensors.pop(FACTORS, None)
        cfg = config_from_hf(_config(fields, tensors))
        _check_keys(fields, cfg)
        if factors is not None:
            cfg = replace(cfg, rope=_llama3(cfg, _dequantised(factors)))

    def ordered(tensor: Tensor, name: str) -> Tensor:
        is_llama = fields["general.architecture"] == "llama"
        return _unpermuted(tensor, name, cfg) if is_llama else tensor

    def read(name: str) -> Tensor:
        return ordered(_dequantised(tensors[name]), name)

    def read_grid(name: str) -> Grid:
        grid = grid_of(tensors[name], _dequantised(tensors[name]))
        return Grid(
            levels_OI=ordered(grid.levels_OI, name),
            scale_OG=ordered(grid.scale_OG, name),
            centre_OG=ordered(grid.centre_OG, name),
        )

    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    few = sum(int(t.n_elements) for t in tensors.values() if has_few_bits(t.tensor_type))
    return Checkpoint(
        cfg=cfg,
        shapes=shapes,
        read=read,
        read_grid=read_grid,
        few_bits=2 * few > sum(int(t.n_elements) for t in tensors.values()),
    )


def _fields(reader: GGUFReader) -> dict[str, Any]:
    """Returns the metadata; a value that every layer has must be the same in all."""
    fields = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    kind = fields["general.architecture"]
    if fields.get("split.count", 1) > 1:
        raise UnsupportedModel(
            f"split.count is {fields['split.count']}: one of several files; join them with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    for key, field in reader.fields.items():
        if key.startswith(f"{kind}.") and key not in fields:
            values = field.contents()
            if any(value != values[0] for value in values):
                raise UnsupportedModel(f"{key}: layers that differ are not implemented")
            fields[key] = values[0]
    return fields


def _hf_name(name: str) -> str:
    """Returns Hugging Face's name of a tensor; an unknown one keeps its own."""
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        stem = BLOCK_NAMES.get(block[2])
        return f"model.layers.{block[1]}.{stem}.{block[3]}" if stem else name
    stem, _, suffix = name.rpartition(".")
    return f"{TOP_NAMES[stem]}.{suffix}" if stem in TOP_NAMES else name


def _config(fields: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """Returns the metadata in the form of a Hugging Face `config.json`."""
    kind = fields["general.architecture"]
    own = {key.removeprefix(f"{kind}."): value for key, value in fields.items()}
    config = {name: own[key] for key, name in CONFIG_KEYS.items() if key in own}
    config["model_type"] = kind
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    config["attention_bias"] = kind != "qwen2" and "model.layers.0.self_attn.q_proj.bias" in tensors
    if "model.embed_tokens.weight" in tensors:
        config["vocab_size"] = int(tensors["model.embed_tokens.weight"].shape[1])
    if "rope.dimension_count" in own:
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        config["partial_rotary_factor"] = own["rope.dimension_count"] / width
    config["bos_token_id"] = fields.get("tokenizer.ggml.bos_token_id")
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    config["eos_token_id"] = sorted({int(end) for end in ends if end is not None})
    config["rope_scaling"] = _scaling(own)
    return config


def _check_keys(fields: Mapping[str, Any], cfg: LMConfig) -> None:
    """Refuses keys of the decoder that this module does not read, unless they are neutral."""
    prefix = f"{fields['general.architecture']}."
    for key in sorted(fields):
        own = key.removeprefix(prefix)
        read = own in CONFIG_KEYS or own in DESCRIPTIONS or own.startswith("rope.")
        if key.startswith(prefix) and not read and not _is_neutral(own, fields[key], cfg.head_dim):
            raise UnsupportedModel(f"{key} = {fields[key]} is not implemented")


def _is_neutral(key: str, value: Any, head_dim: int) -> bool:
    """Whether an unread key leaves the function as it is; 0 means "not set" in GGUF."""
    if key == "attention.causal":
        return bool(value)
    if key == "attention.value_length":
        return bool(value == head_dim)
    if key == "attention.scale":
        return value == 0 or math.isclose(value, head_dim**-0.5, rel_tol=1e-4)
    return value in ("", 0) or ("scale" in key and value == 1)


def _scaling(own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stretching of the rotary frequencies; a factor without a type means `linear`."""
    given = {key: own[key] for key in own if key.startswith("rope.") and key not in ROPE_READ}
    # Old files write the factor of linear scaling so; 0 is "not set".
    old = given.pop("rope.scale_linear", 0)
    factor = given.pop("rope.scaling.factor", 0) or old or 1.0
    kind = given.pop("rope.scaling.type", "none" if factor == 1 else "linear")
    known = {f"rope.scaling.{key}": name for key, name in SCALING_KEYS.items()}
    for key in given:
        if key not in known and not (key.endswith("attn_factor") and given[key] == 1):
            raise UnsupportedModel(f"{key} is not implemented")
    if kind == "none":
        return None
    named = {known[key]: value for key, value in given.items() if key in known}
    return {"rope_type": kind, "factor": factor, **named}


def _llama3(cfg: LMConfig, factors_F: Tensor) -> RopeConfig:
    """Llama 3.1's scaling, if these are the divisors that it makes."""
    factor = float(factors_F.max())
    rope = replace(cfg.rope, kind="llama3", factor=factor, original_max_positions=8192)
    made_F = frequencies(cfg.rope, cfg.head_dim) / frequencies(rope, cfg.head_dim)
    if made_F.shape != factors_F.shape or not torch.allclose(made_F, factors_F.double(), 1e-4):
        raise UnsupportedModel(f"{FACTORS}: other factors than Llama 3.1's are not implemented")
    return rope


def _dequantised(tensor: ReaderTensor) -> Tensor:
    values = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.require(values, np.float32, "W"))


def _unpermuted(tensor: Tensor, name: str, cfg: LMConfig) -> Tensor:
    """Brings rows of q and k from rotated pairs side by side to pairs half a head apart."""
    match = QUERY_OR_KEY.fullmatch(name)
    if not match:
        return tensor
    heads = cfg.num_heads if match[1] == "q" else cfg.num_kv_heads
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
