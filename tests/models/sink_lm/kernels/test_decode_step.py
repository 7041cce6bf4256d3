"""The kernels' decode step against torch's decoder on the same GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from helpers.lm.gguf_files import finish, write_gguf
from helpers.lm.models import MODELS, make_hf, tokens
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.kernels.build import NoKernels
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.decode_step import check_shape
from models.sink_lm.network.llama import Llama

pytestmark = pytest.mark.usefixtures("kernels")

KINDS = {
    "attn_q": Kind.Q4_0,
    "attn_k": Kind.Q4_1,
    "attn_v": Kind.Q8_0,
    "attn_output": Kind.Q5_1,
    "ffn_gate": Kind.Q4_1,
    "ffn_up": Kind.Q4_0,
    "ffn_down": Kind.Q4_1,
    "token_embd": Kind.Q8_0,
    "output": Kind.Q5_0,
}
WIDE = {"intermediate_size": 128, "head_dim": 32, "vocab_size": 112}
SHAPES = {
    "llama": WIDE,
    "llama_tied": WIDE,
    "llama_theta": WIDE,
    "llama_mha": WIDE,
    "llama_mqa_wide_heads": WIDE | {"head_dim": 64, "hidden_size": 160, "num_attention_heads": 5},
    "qwen2": WIDE,
    "qwen3": WIDE | {"hidden_size": 96, "num_attention_heads": 6},
}
CAPACITY, SINKS = 20, 3
# Inputs of 8 bits and a cache in bfloat16, in random models of random weights.
LIMIT = 0.06


def write(folder: Path, name: str) -> str:
    family, changes = MODELS[name]
    hf = make_hf(family, **(changes | SHAPES[name]))
    hf.config.head_dim = SHAPES[name]["head_dim"]
    finish(write_gguf(folder / f"{name}.gguf", hf, quantised=KINDS))
    return str(folder / f"{name}.gguf")


def native(path: str) -> Llama:
    return load_model(path, dtype=torch.int4, kernels="native")


def decoded(model: Llama, tokens_T: Tensor, sinks: int = SINKS) -> tuple[Tensor, Slabs]:
    """Logits after every token of one stream, which lies in the second of two slabs."""
    slabs = model.slabs(sessions=2, capacity=CAPACITY)
    slabs.allocate(0)
    slot = slabs.allocate(sinks)
    return torch.cat([model.decode(token, slabs, [slot]) for token in tokens_T.split(1)]), slabs


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SHAPES)
def test_a_stream_beyond_the_cache_has_the_logits_of_float32(name: str, tmp_path: Path) -> None:
    """Every token of four caches. With a sink less, torch's logits are others."""
    path = write(tmp_path, name)
    exact, ours = load_model(path), native(path)
    tokens_T = tokens(4 * CAPACITY)
    expected, memory = decoded(exact, tokens_T)
    found, slabs = decoded(ours, tokens_T)
    assert found.dtype == torch.float32
    other, _ = decoded(exact, tokens_T, SINKS - 1)
    for part in (slice(at, at + CAPACITY) for at in range(0, len(tokens_T), CAPACITY)):
        assert error(found[part], expected[part]) < LIMIT
        if part.start:
            assert error(found[part], other[part]) > 4 * LIMIT
    # The first layer's keys depend on their own token and position alone: all lie where they lay.
    assert error(slabs.keys_LNHCD[0].float(), memory.keys_LNHCD[0]) < 0.02
    assert error(slabs.values_LNHCD[0].float(), memory.values_LNHCD[0]) < 0.02
    assert not slabs.keys_LNHCD[:, 0].any()


def test_a_session_is_the_same_alone_and_in_a_batch_on_any_threads(tmp_path: Path) -> None:
    """Bit for bit, for sessions of several ages and sinks, in slabs of any order."""
    model = native(write(tmp_path, "llama"))
    sinks, lengths = [0, 3, 5, 3, 1, 0, 2, 9, 4, 3], [3, 50, 2, 0, 19, 20, 21, 64, 7, 33]
    streams = [tokens(100)[n : n + 80] for n in range(10)]
    alone = []
    for stream, sink, length in zip(streams, sinks, lengths, strict=True):
        slabs = model.slabs(sessions=1, capacity=CAPACITY)
        slot = slabs.allocate(sink)
        for token in stream[:length]:
            model.decode(token[None], slabs, [slot])
        alone.append(model.decode(stream[length : length + 1], slabs, [slot]))
    slabs = model.slabs(sessions=10, capacity=CAPACITY)
    slots = [slabs.allocate(sink) for sink in sinks]
    for slot, stream, length in zip(slots, streams, lengths, strict=True):
        for token in stream[:length]:
            model.decode(token[None], slabs, [slot])
    last = torch.stack([stream[n] for stream, n in zip(streams, lengths, strict=True)])
    before = [slabs.length(slot) for slot in slots]
    threads, order = torch.get_num_threads(), [7, 1, 0, 9, 8, 2, 3, 4, 5, 6]
    torch.set_num_threads(2)
    together = model.decode(last[order], slabs, [slots[row] for row in order])
    torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone)[order])
    assert [slabs.length(slot) for slot in slots] == [length + 1 for length in before]


def test_chunks_by_torch_and_steps_by_the_kernels_share_a_stream(tmp_path: Path) -> None:
    path = write(tmp_path, "llama")
    exact, ours = load_model(path), native(path)
    expected, _ = decoded(exact, tokens(60))
    slabs = ours.slabs(sessions=1, capacity=CAPACITY)
    slot, found = slabs.allocate(SINKS), []
    for size in (2, 13, 30):
        ours.prefill(tokens(60)[slabs.length(slot) :][:size], slabs, slot, logits="none")
        at = slabs.length(slot)
        found.append(ours.decode(tokens(60)[at : at + 1], slabs, [slot]))
        assert error(found[-1], expected[at : at + 1]) < LIMIT


def test_a_token_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    model = native(write(tmp_path, "llama"))
    for token in (-1, 112):
        slabs = model.slabs(sessions=1, capacity=CAPACITY)
        with pytest.raises(IndexError, match="not all below 112"):
            model.decode(torch.tensor([token]), slabs, [slabs.allocate(0)])
        assert not slabs.keys_LNHCD.any()


def test_stored_sessions_belong_to_the_weights_whichever_kernels_read_them(tmp_path: Path) -> None:
    """A replica names its sessions by the state that both kinds have."""
    path = write(tmp_path, "qwen2")
    ours = native(path).state_dict()
    theirs = load_model(path, dtype=torch.int4, kernels="torch").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_key_that_is_no_number_is_seen(tmp_path: Path) -> None:
    """It reaches the logits of its own session and of no other."""
    model = native(write(tmp_path, "llama"))
    slabs = model.slabs(sessions=2, capacity=CAPACITY)
    slots = [slabs.allocate(0), slabs.allocate(0)]
    model.decode(tokens(2), slabs, slots)
    slabs.keys_LNHCD[0, slots[0], 0, 0] = torch.nan
    broken, whole = model.decode(tokens(2), slabs, slots)
    assert broken.isnan().all()
    assert whole.isfinite().all()


@pytest.mark.parametrize("change", [{"head_dim": 16}, {"vocab_size": 97}])
def test_shapes_that_blocks_do_not_divide_are_torch_s(
    change: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = make_hf("Llama", **(WIDE | change))
    hf.config.head_dim = (WIDE | change)["head_dim"]
    finish(write_gguf(tmp_path / "model.gguf", hf, quantised=KINDS))
    path, name = str(tmp_path / "model.gguf"), next(iter(change))
    model = load_model(path, dtype=torch.int4)
    assert model.decode_step is None
    assert f"the model's {name}" in caplog.text
    with pytest.raises(NoKernels, match=name):
        check_shape(model.cfg)
    with pytest.raises(ValueError, match=rf"kernels native: .*{name}.*\nTake kernels auto"):
        load_model(path, dtype=torch.int4, kernels="native")
    assert load_model(write(tmp_path, "llama"), dtype=torch.int4).decode_step is not None
