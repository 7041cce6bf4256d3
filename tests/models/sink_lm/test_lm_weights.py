"""Weights: every supported checkpoint gives transformers' logits; every other one is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.lm.models import LINEAR, LLAMA3, MODELS, YARN, difference, make_hf, our_logits, tokens
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.network.config import UnsupportedModel
from models.sink_lm.network.int8 import Int8Linear


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    hf = make_hf(family, **changes)
    hf.save_pretrained(tmp_path)
    assert difference(hf, tmp_path) < 1e-4


def test_every_scaling_changes_the_logits() -> None:
    """A negative control: were the scalings ignored, the test above could not pass."""
    plain = make_hf("Llama")
    for scaling in (LINEAR, LLAMA3, YARN):
        scaled = make_hf("Llama", rope_parameters=scaling)
        with torch.inference_mode():
            gap = plain(tokens()[None]).logits - scaled(tokens()[None]).logits
        assert gap.abs().max() > 0.1


def test_config_of_transformers_4_is_read(tmp_path: Path) -> None:
    """Where `rope_theta` and `rope_scaling` stood before transformers 5."""
    hf = make_hf("Llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    hf.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_scaling=LLAMA3, rope_theta=5e5)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_scaling"]["rope_theta"], config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(hf, tmp_path) < 1e-4


def test_shards_are_read(tmp_path: Path) -> None:
    hf = make_hf("Llama")
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert difference(hf, tmp_path) < 1e-4
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[-1].name):
        load_model(str(tmp_path))


def test_dtype_and_end_tokens(tmp_path: Path) -> None:
    make_hf("Llama").save_pretrained(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    generation["eos_token_id"] = [2, 7]
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert {(w.dtype, w.requires_grad) for w in model.parameters()} == {(torch.bfloat16, False)}
    assert not model.training
    assert (model.cfg.bos_id, model.cfg.eos_ids) == (1, (2, 7))


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3"])
def test_int8_is_the_rounded_model(name: str, rows: int, tmp_path: Path) -> None:
    """Both ways through `Int8Linear` against float32 layers with the same rounded weights."""
    family, changes = MODELS[name]
    make_hf(family, **changes).save_pretrained(tmp_path)
    int8, plain = load_model(str(tmp_path), dtype=torch.int8), load_model(str(tmp_path))
    exact = our_logits(plain, tokens(rows))
    linears = {name: m for name, m in int8.named_modules() if isinstance(m, Int8Linear)}
    assert len(linears) == 4 * plain.cfg.num_layers + 1
    for path, linear in linears.items():
        rounded = linear.weight.float() * linear.scale.float()[:, None]
        own = plain.embed if path == "head" and plain.head is None else plain.get_submodule(path)
        step = linear.scale.float()[:, None]
        assert ((rounded - own.weight).abs() <= 0.51 * step + 1e-7).all()
        if path == "head":
            plain.head = torch.nn.Linear(*rounded.shape[::-1], bias=False)
            own = plain.head
        own.weight = torch.nn.Parameter(rounded, requires_grad=False)
    expected, found = our_logits(plain, tokens(rows)), our_logits(int8, tokens(rows))
    assert found.dtype == torch.float32
    assert error(found, expected) < 0.03  # bfloat16
    assert 1e-3 < error(exact, expected) < 0.1  # the rounding itself


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)


def test_old_rotary_buffers_and_equal_tied_heads_are_allowed(tmp_path: Path) -> None:
    hf = make_hf("Llama", tie_word_embeddings=True)
    hf.save_pretrained(tmp_path)

    def add(state: dict[str, Tensor]) -> None:
        state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]

    edit_tensors(tmp_path, add)
    assert difference(hf, tmp_path) < 1e-4
    edit_tensors(tmp_path, lambda state: state["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_model(str(tmp_path))


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    make_hf("Qwen2").save_pretrained(tmp_path)

    def spoil(state: dict[str, Tensor]) -> None:
        del state["model.norm.weight"], state["model.layers.0.self_attn.k_proj.bias"]
        state["model.layers.1.mlp.up_proj.bias"] = torch.ones(3)
        state["lm_head.weight"] = torch.ones(96, 64)

    edit_tensors(tmp_path, spoil)
    with pytest.raises(ValueError, match="missing") as caught:
        load_model(str(tmp_path))
    assert set(str(caught.value).removeprefix(f"{tmp_path}: ").split("; ")) == {
        "missing model.norm.weight",
        "missing model.layers.0.self_attn.k_proj.bias",
        "unexpected model.layers.1.mlp.up_proj.bias",
        "lm_head.weight is [96, 64], expected [97, 64]",
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            "GPT2LMHeadModel.*positions",
        ),
        ({"architectures": ["OPTForCausalLM"], "model_type": "opt"}, "OPTForCausalLM.*positions"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"attention_bias": True}, "attention_bias"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"is_causal": False}, "is_causal = False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "linear"}}, "without its factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [4, 4]}}, "mrope_section"),
    ],
)
def test_what_cannot_stream_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    make_hf("Llama").save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModel, match=rf"config\.json: .*{named}"):
        load_model(str(tmp_path))


def test_settings_that_change_nothing_are_no_obstacle(tmp_path: Path) -> None:
    hf = make_hf("Llama")
    hf.save_pretrained(tmp_path)
    neutral = {"residual_multiplier": 1.0, "final_logit_softcapping": None, "is_causal": True}
    usual = {"query_pre_attn_scalar": 16, "attention_multiplier": 0.25, "num_local_experts": 0}
    other = {"chunk_size_feed_forward": 0, "use_mrope": False, "max_window_layers": 2}
    edit_config(tmp_path, **neutral, **usual, **other, unsloth_version="2026.1")
    assert difference(hf, tmp_path) < 1e-4


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("file", "spoil", "named"),
    [
        ("model.safetensors", lambda path: cut(path, 5000), "damaged or cut off"),
        ("model.safetensors", lambda path: cut(path, 4), "damaged or cut off"),
        (
            "model.safetensors",
            lambda path: path.write_text("version https://git-lfs.example/spec/v1\noid sha256:0"),
            "Git LFS pointer",
        ),
        ("config.json", lambda path: path.write_text("{"), "JSONDecodeError"),
        ("config.json", lambda path: path.write_text("[1]"), "holds a JSON list"),
        ("config.json", lambda path: edit_config(path.parent, hidden_size=None), "TypeError"),
        ("config.json", lambda path: edit_config(path.parent, num_key_value_heads="x"), "'x'"),
        ("config.json", lambda path: edit_config(path.parent, rope_scaling="x"), "rope_scaling = "),
        ("config.json", lambda path: cut(path, 0), "JSONDecodeError"),
        ("generation_config.json", lambda path: path.write_text("null"), "NoneType, not an object"),
        ("model.safetensors.index.json", lambda path: path.write_text("{}"), "no 'weight_map'"),
        ("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": 3}'), "int"),
    ],
)
def test_damaged_files_are_named(
    file: str, spoil: Callable[[Path], object], named: str, tmp_path: Path
) -> None:
    make_hf("Llama").save_pretrained(tmp_path)
    spoil(tmp_path / file)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / file))}: .*{named}"):
        load_model(str(tmp_path))


def test_a_setting_that_is_missing_is_named_with_its_file(tmp_path: Path) -> None:
    make_hf("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: gives no 'vocab_size'"):
        load_model(str(tmp_path))


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json, and 0 \.gguf"):
        load_model(str(tmp_path))
    make_hf("Llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file$"):
        load_model(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"\.bin and \.pt files are not read"):
        load_model(str(tmp_path))


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf("Llama")
    hf.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def give(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(hub_id)
        assert "*.safetensors" in allow_patterns
        assert not any("py" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert load_model("org/name").cfg.vocab_size == 97
    assert asked == ["org/name"]

    def refuse(hub_id: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"org/other: .*no network"):
        load_model("org/other")
