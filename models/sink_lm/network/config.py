"""Shape and rotary settings of a decoder, read from a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"),
        *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    )
)
# Settings with which other decoders change the function have one of these words in their names.
# The values listed for a word leave the function as it is. Any other value is refused, even of a
# setting that this code does not know.
OFF = (None, False, 0)
NEUTRAL = {
    "alibi": OFF,
    "bidirectional": OFF,
    "causal": (None, True),
    "chunk": OFF,
    "clip": OFF,
    "cross_attention": OFF,
    "expert": (*OFF, 1),
    "lora": OFF,
    "moe": (*OFF, 1),
    "multiplier": (None, 1),
    "parallel_residual": OFF,
    "qk_layernorm": OFF,
    "qk_norm": OFF,
    "rope": OFF,
    "rotary": (None, False, 1),
    "scal": (None, False, 1),
    "softcap": OFF,
    "window": OFF,
}
# Settings that are read below, or have no meaning without a window.
READ = frozenset(
    (
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
        *("sliding_window", "use_sliding_window", "max_window_layers"),
    )
)

RopeKind = Literal["default", "linear", "llama3", "yarn"]


class UnsupportedModel(ValueError):
    """The model cannot stream with a sink cache, or this decoder does not support it."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; every kind here rotates by position times a fixed frequency."""

    theta: float = 10_000.0
    """Base of the frequencies."""
    kind: RopeKind = "default"
    """Rule that stretches the frequencies to a longer context."""
    factor: float = 1.0
    """How much longer the context is than the original one."""
    original_max_positions: int = 0
    """Trained context before stretching (`llama3`, `yarn`)."""
    low_freq_factor: float = 1.0
    """`llama3`: wavelengths above original / this are stretched in full."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths below original / this stay."""
    beta_fast: float = 32.0
    """`yarn`: dimensions with more turns than this over the original context stay."""
    beta_slow: float = 1.0
    """`yarn`: dimensions with fewer turns than this are stretched in full."""
    attention_factor: float | None = None
    """`yarn`: factor on rotated queries and keys; None takes 0.1 ln(factor) + 1."""
    truncate: bool = True
    """`yarn`: round the border dimensions to whole ones."""


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Shape of a Llama-style decoder."""

    vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated MLP."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; query heads share them in equal groups."""
    head_dim: int
    """Width of one head."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head is the embedding, transposed."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias (Qwen2)."""
    qk_norm: bool = False
    """Whether an RMSNorm acts on every query and key head before rotation (Qwen3)."""
    rope: RopeConfig = RopeConfig()
    """Rotary embedding."""
    max_positions: int = 2048
    """Trained context: positions inside the cache must stay below it."""
    sliding_window: int | None = None
    """Tokens a query saw in training (Mistral 7B v0.1); None saw all."""
    bos_id: int | None = None
    """Token that starts a stream."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a text."""

    def __post_init__(self) -> None:
        """Checks that heads can be grouped and rotated.

        Raises:
            UnsupportedModel: the heads cannot be grouped, or their width is odd.
        """
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads {self.num_heads} is no multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim {self.head_dim} is odd: it cannot be rotated")


def config_from_hf(config: Mapping[str, Any]) -> LMConfig:
    """Reads a Hugging Face `config.json`, of transformers 4 or 5.

    Raises:
        UnsupportedModel: names the architecture or the setting that cannot stream.
    """
    kind = _check_architecture(config)
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    _check_details(config, kind)
    return LMConfig(
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")),
        qk_norm=kind == "qwen3",
        rope=_rope(config),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        sliding_window=_sliding_window(config, kind),
        bos_id=config.get("bos_token_id"),
        eos_ids=_as_tuple(config.get("eos_token_id")),
    )


def _check_architecture(config: Mapping[str, Any]) -> str:
    """Returns the model type."""
    named = [name for name in config.get("architectures") or () if name in ARCHITECTURES]
    kind = ARCHITECTURES[named[0]] if named else str(config.get("model_type", ""))
    if kind in ARCHITECTURES.values():
        return kind
    name = (config.get("architectures") or [kind or "a model without a type"])[0]
    reason = "is not one of " + ", ".join(ARCHITECTURES)
    if kind in ("gpt2", "opt", "gpt_neo", "xglm", "biogpt", "codegen"):
        reason = "adds learned absolute positions, which end where training ended: it cannot stream"
    raise UnsupportedModel(f"{name} {reason}")


def _check_details(config: Mapping[str, Any], kind: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {activation!r}: only silu is implemented")
    if config.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias is not implemented")
    if config.get("attention_bias") and kind in ("llama", "qwen3"):
        raise UnsupportedModel("attention_bias (a bias on the output projection too)")
    for key, value in config.items():
        words = () if key in READ else [word for word in NEUTRAL if word in key]
        if any(value not in NEUTRAL[word] for word in words) and not _is_usual(key, value, config):
            raise UnsupportedModel(f"{key} = {value!r} is not implemented")
    if set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"layer_types {config['layer_types']!r} is not implemented")


def _is_usual(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a setting only states the default, scores divided by sqrt(head_dim)."""
    width = config.get("head_dim") or config["hidden_size"] / config["num_attention_heads"]
    usual = {"query_pre_attn_scalar": width, "attention_multiplier": width**-0.5}
    return key in usual and math.isclose(value, usual[key], rel_tol=1e-4)


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):  # transformers 5 holds theta in the second
        given = config.get(name) or {}
        if not isinstance(given, Mapping):
            raise UnsupportedModel(f"{name} = {given!r} is not an object")
        found |= given
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"rope type {kind!r} is not one of {', '.join(ROPE_KINDS)}")
    unknown = sorted(key for key in found.keys() - ROPE_KEYS if found[key] is not None)
    if unknown:
        raise UnsupportedModel(f"rope setting {unknown[0]} is not implemented")
    if kind != "default" and found.get("factor") is None:
        raise UnsupportedModel(f"rope type {kind!r} without its factor")
    partial = found.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if float(partial) != 1.0:
        raise UnsupportedModel("partial_rotary_factor: partly rotated heads are not implemented")
    theta = found.get("rope_theta") or config.get("rope_theta") or 10_000.0
    trained = found.get("original_max_position_embeddings")
    simple = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    return RopeConfig(
        theta=float(theta),
        kind=cast(RopeKind, kind),
        original_max_positions=int(trained or config.get("max_position_embeddings") or 0),
        attention_factor=_attention_factor(found),
        truncate=bool(found.get("truncate", True)),
        **{key: float(found[key]) for key in simple if found.get(key) is not None},
    )


def _attention_factor(found: Mapping[str, Any]) -> float | None:
    if found.get("mscale") and found.get("mscale_all_dim"):
        raise UnsupportedModel("yarn with mscale and mscale_all_dim is not implemented")
    value = found.get("attention_factor")
    return None if value is None else float(value)


def _sliding_window(config: Mapping[str, Any], kind: str) -> int | None:
    window = config.get("sliding_window")
    if window is None or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        return None
    if kind.startswith("qwen"):
        raise UnsupportedModel("use_sliding_window: layers with different windows")
    return int(window)


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
