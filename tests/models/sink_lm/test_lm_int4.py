"""4-bit weights: what the file says, whichever way they are multiplied."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from helpers.lm.gguf_files import finish, write_gguf
from helpers.lm.models import MODELS, make_hf, our_logits, tokens
from models.sink_lm.checkpoints import dtypes, loading
from models.sink_lm.checkpoints.dtypes import dtype_of
from models.sink_lm.checkpoints.gguf_grids import grid_of
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.network.int4 import Grid, Int4Linear

# Bytes of a block, and of them which are float16.
BLOCKS = {
    Kind.Q4_0: (18, (0,)),
    Kind.Q4_1: (20, (0, 2)),
    Kind.Q5_0: (22, (0,)),
    Kind.Q5_1: (24, (0, 2)),
    Kind.Q8_0: (34, (0,)),
    Kind.Q4_K: (144, (0, 2)),
    Kind.Q5_K: (176, (0, 2)),
    Kind.Q6_K: (210, (208,)),
}
MIXED = {
    "attn_q": Kind.Q4_0,
    "attn_k": Kind.Q4_1,
    "attn_v": Kind.Q8_0,
    "attn_output": Kind.Q5_1,
    "ffn_gate": Kind.Q4_1,
    "ffn_up": Kind.Q4_0,
    "ffn_down": Kind.F16,
    "token_embd": Kind.Q8_0,
    "output": Kind.Q5_0,
}
FOUR_BITS = dict.fromkeys(MIXED, Kind.Q4_1)


class _File:
    """A tensor as `GGUFReader` gives it: random levels under sensible scales."""

    def __init__(self, kind: Kind, outputs: int, blocks: int) -> None:
        size, halves = BLOCKS[kind]
        random = np.random.default_rng(int(kind))
        data = random.integers(0, 256, (outputs, blocks, size), dtype=np.uint8)
        for at in halves:
            scales = random.normal(0, 0.01, (outputs, blocks, 1)).astype(np.float16)
            data[..., at : at + 2] = scales.view(np.uint8)
        self.data, self.tensor_type = data.reshape(outputs, -1), kind
        self.n_bytes = data.size
        self.n_elements = outputs * blocks * (256 if kind.name.endswith("_K") else 32)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_grid_is_what_the_gguf_package_reads(kind: Kind) -> None:
    file = _File(kind, outputs=6, blocks=3)
    expected = torch.from_numpy(gguf.dequantize(file.data, kind))
    grid = grid_of(file, expected)  # type: ignore[arg-type]
    found, step = of(grid), grid.scale_OG.abs().repeat_interleave(32, dim=1)
    allowed = 0.51 * step if kind == Kind.Q6_K else 1e-5 * step + 1e-6 * expected.abs()
    assert ((found - expected).abs() <= allowed).all()
    assert grid.is_narrow == kind.name.startswith("Q4")


def of(grid: Grid) -> Tensor:
    """The matrix that a grid stands for."""
    groups_OG32 = grid.levels_OI.float().unflatten(1, (-1, 32))
    return (groups_OG32 * grid.scale_OG[..., None] + grid.centre_OG[..., None]).flatten(1)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("levels", [(-8, 8), (-128, 128)], ids=["narrow", "two planes"])
def test_the_operator_multiplies_by_the_grid(levels: tuple[int, int], rows: int) -> None:
    torch.manual_seed(rows)
    grid = Grid(
        levels_OI=torch.randint(*levels, (48, 96)).to(torch.int8),
        scale_OG=torch.rand(48, 3) + 0.1,
        centre_OG=torch.randn(48, 3) * levels[1] / 4,
    )
    x_BI, bias_O = torch.randn(rows, 96).bfloat16(), torch.randn(48).bfloat16()
    linear = Int4Linear(grid, torch.nn.Identity(), bias_O)
    expected = x_BI.double() @ of(grid).double().T + bias_O
    assert error(linear.narrow(x_BI), expected) < 5e-3  # bfloat16
    shifted = Grid(
        levels_OI=grid.levels_OI, scale_OG=grid.scale_OG, centre_OG=grid.centre_OG.roll(1, 0)
    )
    assert error(linear.narrow(x_BI), x_BI.double() @ of(shifted).double().T + bias_O) > 2e-2


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2"])
@pytest.mark.parametrize("vocab", [112, 97], ids=["112", "97: no block of 16"])
def test_int4_is_the_file_s_own_model(name: str, vocab: int, tmp_path: Path) -> None:
    """Against float32 layers of the same file, for few rows and for many."""
    path = tmp_path / "model.gguf"
    write(path, name, vocab, MIXED)
    exact, few = load_model(str(path)), load_model(str(path), dtype=torch.int4)
    linears = [module for module in few.modules() if isinstance(module, Int4Linear)]
    assert len(linears) == 4 * few.cfg.num_layers + (vocab == 112)
    for limit in (0, 1000):
        for linear in linears:
            linear.few_rows = limit
        assert 1e-4 < error(our_logits(few, tokens(60)), our_logits(exact, tokens(60))) < 0.03


def test_a_row_is_the_same_in_a_batch_and_alone(tmp_path: Path) -> None:
    """The 4-bit operator sums every row by itself."""
    path = tmp_path / "model.gguf"
    write(path, "llama", 112, FOUR_BITS)
    linear = load_model(str(path), dtype=torch.int4).layers[0].gate_up
    assert isinstance(linear, Int4Linear)
    x_BI = torch.randn(7, 64).bfloat16()
    alone = torch.cat([linear.narrow(x_1I) for x_1I in x_BI.split(1)])
    assert torch.equal(linear.narrow(x_BI), alone)


def write(path: Path, name: str, vocab: int, quantised: dict[str, Kind]) -> None:
    family, changes = MODELS[name]
    shape = {"vocab_size": vocab, "intermediate_size": 128, "head_dim": 16}
    hf = make_hf(family, **(shape | changes))
    hf.config.head_dim = 16
    finish(write_gguf(path, hf, quantised=quantised))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_auto_takes_what_suits_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, wide = tmp_path / "few.gguf", tmp_path / "wide.gguf"
    write(few, "llama", 112, FOUR_BITS)
    write(wide, "llama", 112, {})
    make_hf("Llama").save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(dtypes, "can_pack", lambda dtype: True)
    other = torch.bfloat16
    assert dtype_of("auto", str(few), "cpu") == torch.int4
    assert dtype_of("auto", str(wide), "cpu") == other
    assert dtype_of("auto", str(tmp_path / "hf"), "cpu") == other
    assert dtype_of("auto", str(few), "cuda") == torch.bfloat16
    assert dtype_of("fp16", "not looked at", "cpu") == torch.float16
    monkeypatch.setattr(dtypes, "is_supported", lambda device: False)
    assert dtype_of("auto", str(few), "cpu") == other
    monkeypatch.setattr(dtypes, "can_pack", lambda dtype: False)
    assert dtype_of("auto", str(few), "cpu") == torch.float32


def test_int4_says_where_it_does_not_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf("Llama").save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"int4 keeps the bits of a GGUF file.*\n.*bf16 or int8"):
        load_model(str(tmp_path / "hf"), dtype=torch.int4)
    write(tmp_path / "model.gguf", "llama", 112, FOUR_BITS)
    with pytest.raises(ValueError, match=r"no 4-bit operator for the device cuda.*\nTake dtype"):
        load_model(str(tmp_path / "model.gguf"), dtype=torch.int4, device="cuda")
    monkeypatch.setattr(loading, "is_supported", lambda device: False)
    with pytest.raises(ValueError, match=r"no 4-bit operator for the device cpu"):
        load_model(str(tmp_path / "model.gguf"), dtype=torch.int4)
