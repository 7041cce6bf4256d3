"""The sink cache against the paper's own procedure, written here token by token in float64.

The reference keeps keys un-rotated, evicts after every token, and rotates the whole cache by cache
index at every step (Xiao et al. 2023, section 3.2): nothing is shared with the code under test but
the weights.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from models.sink_lm.network.cache import NoFreeSlab, Slabs
from models.sink_lm.network.config import LMConfig, RopeConfig
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.rope import frequencies, rotation

SINKS, WINDOW = 3, 8
CACHE = SINKS + WINDOW  # the paper's cache size; the token itself comes on top
CAPACITY = CACHE + 1


def small(**changes: object) -> LMConfig:
    shape = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "max_positions": 4096,
    }
    return LMConfig(**(shape | changes))  # type: ignore[arg-type]


def build(cfg: LMConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    model = Llama(cfg).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


PHASES = frequencies(RopeConfig(), 64)


def rotation_in_float32(position: int) -> Tensor:
    return (torch.tensor(position, dtype=torch.float32) * PHASES.float()).cos().double()


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def turned(vector: Tensor, position: int, theta: float) -> Tensor:
    """Rotates one head at one position by complex numbers, unlike the code under test."""
    half = len(vector) // 2
    angles = [position * theta ** (-2 * i / len(vector)) for i in range(half)]
    turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
    product = torch.complex(vector[:half], vector[half:]) * turn
    return torch.cat((product.real, product.imag))


class Reference:
    """StreamingLLM on the same weights, one token at a time, whole cache rotated each step."""

    def __init__(self, model: Llama, sinks: int, window: int) -> None:
        self.model, self.sinks, self.window = model, sinks, window
        self.cache: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]

    def feed(self, token: int) -> Tensor:
        x = self.model.embed.weight[token]
        for layer, cache in zip(self.model.layers, self.cache, strict=True):
            x = self.layer(layer, cache, x)
        head = self.model.head.weight
        return head @ norm(x, self.model.norm.weight, self.model.cfg.norm_eps)

    def layer(
        self, layer: torch.nn.Module, cache: list[tuple[Tensor, Tensor]], x: Tensor
    ) -> Tensor:
        cfg = self.model.cfg
        heads = (layer.qkv.weight @ norm(x, layer.attention_norm.weight, cfg.norm_eps)).view(
            -1, cfg.head_dim
        )
        q, k = heads[: cfg.num_heads], heads[cfg.num_heads :][: cfg.num_kv_heads]
        v = heads[cfg.num_heads + cfg.num_kv_heads :]
        cache.append((k, v))
        out = []
        for head in range(cfg.num_heads):
            shared = head * cfg.num_kv_heads // cfg.num_heads
            query = turned(q[head], len(cache) - 1, cfg.rope.theta)
            keys = [turned(key[shared], i, cfg.rope.theta) for i, (key, _) in enumerate(cache)]
            scores = torch.stack(keys) @ query / math.sqrt(cfg.head_dim)
            out.append(scores.softmax(0) @ torch.stack([value[shared] for _, value in cache]))
        if len(cache) > self.sinks + self.window:
            del cache[self.sinks]
        x = x + layer.out.weight @ torch.cat(out)
        h = layer.gate_up.weight @ norm(x, layer.mlp_norm.weight, cfg.norm_eps)
        gate, up = h.chunk(2)
        return x + layer.down.weight @ (gate * torch.sigmoid(gate) * up)


def reference_logits(
    model: Llama, stream: Tensor, sinks: int = SINKS, window: int = WINDOW
) -> Tensor:
    reference = Reference(model, sinks, window)
    with torch.no_grad():
        return torch.stack([reference.feed(int(token)) for token in stream])


@functools.cache
def long_stream(kv_heads: int, sinks: int) -> tuple[Llama, Tensor, Tensor]:
    """A model, ten caches of tokens, and the paper's logits for them."""
    model, stream = build(small(num_kv_heads=kv_heads)), tokens(10 * CACHE + 1)
    return model, stream, reference_logits(model, stream, sinks, CACHE - sinks)


@pytest.mark.parametrize(
    ("kv_heads", "sinks"),
    [(4, SINKS), (2, 0), (2, 1), (2, SINKS), (1, SINKS)],
    ids=["mha", "gqa-window", "gqa-1", "gqa", "mqa"],
)
def test_token_by_token_equals_the_paper(kv_heads: int, sinks: int) -> None:
    """Every t from 0 to 10 C: {0, S-1, S, C-1, C, C+1, 2C, 10C} among them."""
    model, stream, expected = long_stream(kv_heads, sinks)
    slabs = model.slabs(sessions=1, capacity=CAPACITY)
    slot = slabs.allocate(sinks)
    found = torch.cat([model.decode(token[None], slabs, [slot]) for token in stream])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, CAPACITY, 64, 10 * CACHE + 1])
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_every_chunk_size_equals_the_paper(chunk: int, sinks: int) -> None:
    model, stream, expected = long_stream(2, sinks)
    slabs = model.slabs(sessions=1, capacity=CAPACITY)
    slot = slabs.allocate(sinks)
    parts = [model.prefill(part, slabs, slot, logits="all") for part in stream.split(chunk)]
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-9, rtol=0)


def test_chunks_and_single_tokens_mix() -> None:
    model = build(small())
    stream = tokens(120)
    expected = reference_logits(model, stream)
    slabs = model.slabs(sessions=1, capacity=CAPACITY)
    slot, start, found = slabs.allocate(SINKS), 0, []
    for chunk in (2, 1, 5, 30, 1, 1, 13, 1, 40, 1, 1, 24):
        part = stream[start : start + chunk]
        if chunk == 1:
            found.append(model.decode(part, slabs, [slot]))
        else:
            found.append(model.prefill(part, slabs, slot, logits="all"))
        start += chunk
    assert start == len(stream)
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-9, rtol=0)


def test_eight_sessions_of_mixed_age_and_sinks_decode_together() -> None:
    """Different lengths, sinks and gaps between slabs; some full, one empty, slots in any order."""
    model = build(small())
    ages = [0, 1, SINKS, CACHE - 1, CACHE, CACHE + 1, 2 * CACHE, 10 * CACHE]
    sinks = [3, 3, 0, 1, 3, 5, 2, 3]
    slabs = model.slabs(sessions=11, capacity=CAPACITY)
    slots, expected = [], []
    for row, (age, count) in enumerate(zip(ages, sinks, strict=True)):
        slots.append(slabs.allocate(count))
        if row in (1, 4, 5):
            slabs.allocate(0)  # leaves a gap
        stream = tokens(age + 4, seed=row)
        expected.append(reference_logits(model, stream, count, CACHE - count)[age:])
        if age:
            model.prefill(stream[:age], slabs, slots[-1], logits="none")
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    for step in range(4):
        batch = torch.stack([tokens(ages[row] + 4, seed=row)[ages[row] + step] for row in order])
        found = model.decode(batch, slabs, [slots[row] for row in order])
        wanted = torch.stack([expected[row][step] for row in order])
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)


def test_chunks_of_several_sessions_in_one_pass_equal_the_paper() -> None:
    """Sessions of mixed age and sinks; one chunk is a single token, one longer than the cache."""
    model = build(small())
    ages, sinks, sizes = [0, 2, CACHE, 3 * CACHE], [3, 5, 0, 2], [7, 1, 2 * CACHE, 4]
    slabs = model.slabs(sessions=4, capacity=CAPACITY)
    streams = [tokens(age + size, seed=age) for age, size in zip(ages, sizes, strict=True)]
    slots = [slabs.allocate(count) for count in sinks]
    for age, stream, slot in zip(ages, streams, slots, strict=True):
        if age:
            model.prefill(stream[:age], slabs, slot, logits="none")
    parts = [stream[age:] for age, stream in zip(ages, streams, strict=True)]
    read = model.read_packed(parts, slabs, slots)
    for age, stream, count, x_TE in zip(ages, streams, sinks, read, strict=True):
        expected = reference_logits(model, stream, count, CACHE - count)[age:]
        torch.testing.assert_close(model.logits(x_TE), expected, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="twice"):
        model.read_packed(parts[:2], slabs, slots[:1] * 2)


def test_keeping_sinks_at_their_true_distance_gives_other_logits() -> None:
    """Negative control: without the correction the assertion of this file fails by far."""
    model = build(small())
    stream = tokens(4 * CACHE)
    slabs = model.slabs(sessions=1, capacity=CAPACITY)
    slot = slabs.allocate(SINKS)
    model.prefill(stream[:-1], slabs, slot, logits="none")
    from models.sink_lm.network.attention import DecodeAttention

    attend = DecodeAttention([slot], slabs, *model.rotary(stream.device))
    attend.rotate_for_sinks = None
    with torch.inference_mode():
        wrong = model.logits(model.run(stream[-1:], attend))[0]
    assert (wrong - reference_logits(model, stream)[-1]).abs().max() > 1e-2


def test_a_billion_tokens_down_the_stream_nothing_has_drifted() -> None:
    """Scores depend on distances only, so where in the stream they are taken must not show."""
    model = build(small())
    stream = tokens(2 * CACHE)

    def logits_from(start: int) -> Tensor:
        slabs = model.slabs(sessions=1, capacity=CAPACITY)
        slot = slabs.allocate(0)
        slabs.advance(slot, start - start % CAPACITY)  # the ring's slots are where they were
        return torch.cat([model.decode(token[None], slabs, [slot]) for token in stream])

    near = logits_from(2 * CAPACITY)
    assert (logits_from(10**9) - near).abs().max() < 1e-5
    single = rotation_in_float32(10**9)
    exact_B1D = rotation(torch.tensor([10**9]), PHASES, 1.0, torch.float64).cos_B1D
    assert (single - exact_B1D[..., : len(PHASES)]).max() > 0.1


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.3)],
)
@pytest.mark.parametrize("chunk", [1, 7, 5 * CACHE])
def test_other_dtypes_are_close(dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    model = build(small())
    stream = tokens(5 * CACHE)
    expected = reference_logits(model, stream)
    model = model.to(dtype)
    slabs = model.slabs(sessions=1, capacity=CAPACITY)
    slot = slabs.allocate(SINKS)
    assert slabs.keys_LNHCD.dtype == slabs.values_LNHCD.dtype == dtype
    if chunk == 1:
        found = torch.cat([model.decode(token[None], slabs, [slot]) for token in stream])
    else:
        parts = [model.prefill(part, slabs, slot, logits="all") for part in stream.split(chunk)]
        found = torch.cat(parts)
    assert found.dtype == torch.float32
    error = (found.double() - expected).abs().mean() / expected.abs().mean()
    assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_an_overflow_left_in_a_slab_does_not_reach_its_next_session(
    dtype: torch.dtype,
) -> None:
    """A chunk shorter than the sinks, and a young session that decodes beside an old one."""
    model = build(small()).to(dtype)
    stream = tokens(4 * CACHE)

    def run(*, poisoned: bool) -> Tensor:
        slabs = model.slabs(sessions=2, capacity=CAPACITY)
        old, young = slabs.allocate(SINKS), slabs.allocate(SINKS)
        model.prefill(stream, slabs, old, logits="none")
        if poisoned:
            slabs.keys_LNHCD[:, young] = torch.nan
            slabs.values_LNHCD[:, young] = torch.inf
        slabs.release(young)
        young = slabs.allocate(SINKS)
        chunk = model.prefill(stream[: SINKS - 1], slabs, young, logits="all")
        batch = model.decode(stream[:2], slabs, [old, young])
        return torch.cat((chunk, batch))

    found = run(poisoned=True)
    assert found.isfinite().all()
    assert torch.equal(found, run(poisoned=False))


def test_export_restore_and_copy_go_on_bitwise() -> None:
    model = build(small())
    stream = tokens(60)
    slabs = model.slabs(sessions=3, capacity=CAPACITY)
    first = slabs.allocate(SINKS)
    model.prefill(stream[:50], slabs, first, logits="none")
    state = slabs.export(first)
    second, third = slabs.allocate(0), slabs.allocate(0)
    slabs.copy(first, second)
    expected = [model.decode(token[None], slabs, [first]) for token in stream[50:]]
    slabs.restore(third, state)
    for slot in (second, third):
        again = [model.decode(token[None], slabs, [slot]) for token in stream[50:]]
        assert torch.equal(torch.cat(again), torch.cat(expected))
    assert slabs.length(third) == 60
    state["keys"] = state["keys"].float()
    with pytest.raises(ValueError, match="keys are"):
        slabs.restore(third, state)


def test_slabs_are_finite_and_reused() -> None:
    slabs = Slabs(small(), sessions=2, capacity=CAPACITY, dtype=torch.float32)
    assert slabs.bytes_per_session == 2 * 3 * 2 * CAPACITY * 6 * 4
    assert [slabs.allocate(0), slabs.allocate(SINKS)] == [0, 1]
    with pytest.raises(NoFreeSlab):
        slabs.allocate(0)
    slabs.release(0)
    assert (slabs.allocate(1), slabs.length(0), slabs.sinks(0)) == (0, 0, 1)
    with pytest.raises(ValueError, match="sinks 11"):
        Slabs(small(), sessions=1, capacity=CAPACITY, dtype=torch.float32).allocate(11)
    with pytest.raises(ValueError, match="capacity 5000"):
        Slabs(small(), sessions=1, capacity=5000, dtype=torch.float32)


def test_one_session_twice_in_a_batch_is_refused() -> None:
    model = build(small())
    slabs = model.slabs(sessions=1, capacity=CAPACITY)
    slot = slabs.allocate(SINKS)
    with pytest.raises(ValueError, match="twice"):
        model.decode(tokens(2), slabs, [slot, slot])


def test_stretched_frequencies_stream_as_well() -> None:
    rope = RopeConfig(kind="linear", factor=4.0)
    model = build(small(rope=rope))
    stream = tokens(5 * CACHE)
    slabs = model.slabs(sessions=2, capacity=CAPACITY)
    one, whole = slabs.allocate(SINKS), slabs.allocate(SINKS)
    single = torch.cat([model.decode(token[None], slabs, [one]) for token in stream])
    torch.testing.assert_close(
        model.prefill(stream, slabs, whole, logits="all"), single, atol=1e-9, rtol=0
    )
