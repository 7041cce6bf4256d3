"""A decoder tuned for this CPU computes what it computed before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from helpers.lm.gguf_files import finish, write_gguf
from helpers.lm.models import MODELS, make_hf, our_logits, tokens
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.network import tuning
from models.sink_lm.network.int4 import Int4Linear
from models.sink_lm.network.tuning import PackedLinear, can_pack, tune

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.int4: 3e-2}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
def test_tuning_does_not_change_the_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    hf = make_hf(family, **({"intermediate_size": 128, "head_dim": 16} | changes))
    hf.config.head_dim = 16
    kinds = dict.fromkeys(("attn_q", "ffn_gate", "ffn_down"), GGMLQuantizationType.Q4_0)
    finish(write_gguf(tmp_path / "model.gguf", hf, quantised=kinds))
    model = load_model(str(tmp_path), dtype=dtype)
    before = our_logits(model, tokens(60))
    weights = [p.detach().clone() for p in model.parameters()]
    tune(model)
    after = our_logits(model, tokens(60))
    assert float((after - before).norm() / before.norm()) < LIMITS[dtype]
    if can_pack(torch.bfloat16 if dtype == torch.int4 else dtype):
        assert any(isinstance(module, PackedLinear) for module in model.modules())
        assert len(list(model.parameters())) < len(weights)  # the plain matrices are given up


def test_float64_is_left_alone(tmp_path: Path) -> None:
    make_hf("Llama").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float64)
    tune(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize(("narrow_ms", "expected"), [(1, 32), (6, 8), (7, 4), (70, 0)])
def test_rows_follow_the_measurement(
    narrow_ms: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrow way takes longer with every row, the wide one 60 ms for any number."""
    hf = make_hf("Llama", intermediate_size=128, vocab_size=112)
    kinds = {"ffn_down": GGMLQuantizationType.Q4_0}
    finish(write_gguf(tmp_path / "model.gguf", hf, quantised=kinds))
    model = load_model(str(tmp_path), dtype=torch.int4)

    def seconds(ways, x_BI):  # type: ignore[no-untyped-def]
        is_narrow = ways[0].__name__ == "narrow" if hasattr(ways[0], "__name__") else False
        return narrow_ms * len(x_BI) / 1e3 if is_narrow else 0.06

    monkeypatch.setattr(tuning, "_seconds", seconds)
    tuning.choose_rows(model)
    rows = {module.few_rows for module in model.modules() if isinstance(module, Int4Linear)}
    assert rows == {expected}
