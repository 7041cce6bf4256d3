"""GGUF files of small random models, in the types that llama.cpp knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from models.sink_lm.checkpoints.gguf_file import BLOCK_NAMES, TOP_NAMES


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    top = {hf: ours for ours, hf in TOP_NAMES.items()}
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{({hf: ours for ours, hf in BLOCK_NAMES.items()})[rest]}.{suffix}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Converts q and k to llama.cpp's layout, where the two rows of a rotated pair are adjacent."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path,
    hf: Any,
    extra: dict[str, np.ndarray] | None = None,
    quantised: Mapping[str, GGMLQuantizationType] | None = None,
) -> gguf.GGUFWriter:
    """Begins a GGUF file of a transformers model; the caller adds metadata and calls `finish`.

    `quantised` gives types to matrices, by the last part of their names.
    """
    config = hf.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    arrays = {gguf_name(k): v.detach().numpy() for k, v in hf.state_dict().items()}
    if config.tie_word_embeddings:
        del arrays["output.weight"]
    for name, array in (arrays | (extra or {})).items():
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if config.model_type == "llama" else None
        array = permuted(array, count) if count else array
        kind = (quantised or {}).get(name.split(".")[-2]) if array.ndim == 2 else None
        if kind is not None:
            array = gguf.quantize(array, kind)
        writer.add_tensor(name, array, raw_dtype=kind)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
