"""Random models of transformers, small enough to test with, and the real one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.network.llama import Llama
from pipelines.fetchers.language_model import fetch_smollm2

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# original_max_position_embeddings 32 puts several wavelengths on each side of every border.
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10_000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10_000.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama_mqa_wide_heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama_theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama_llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 128}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied_yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_mha_tied": (
        "Qwen3",
        {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True},
    ),
}


def make_hf(family: str, **changes: Any) -> Any:
    """A random model of transformers whose every weight matters: no zero bias, no norm of one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            weight.data += 0.3 * torch.randn_like(weight)
        else:
            weight.data = 0.15 * torch.randn_like(weight)
    return model


def tokens(count: int = 100) -> Tensor:
    return torch.randint(
        0, SHAPE["vocab_size"], (count,), generator=torch.Generator().manual_seed(1)
    )


def our_logits(model: Llama, tokens_T: Tensor) -> Tensor:
    slabs = model.slabs(sessions=1, capacity=len(tokens_T) + 8)
    logits_TV = model.prefill(tokens_T, slabs, slabs.allocate(0), logits="all")
    assert logits_TV is not None
    return logits_TV


@torch.inference_mode()
def difference(hf: Any, path: Path) -> float:
    """The largest difference of logits to transformers', which are of the order of 5."""
    theirs_TV = hf(tokens()[None]).logits[0]
    assert theirs_TV.abs().max() > 1
    return float((our_logits(load_model(str(path)), tokens()) - theirs_TV).abs().max())


def smollm2_file(spare: Path) -> Path:
    """The GGUF file of SmolLM2: in the folder RAYJEPA_SMOLLM2, or fetched into `spare`."""
    return fetch_smollm2(Path(os.environ.get("RAYJEPA_SMOLLM2") or spare))
