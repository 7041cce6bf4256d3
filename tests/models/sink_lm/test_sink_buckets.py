"""The decode step of static shapes against `Llama.decode`, which is held against the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.lm.tiny_model import tiny_llama
from models.sink_lm.network.buckets import BucketAttention, BucketDecoder, bucket
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.llama import Llama

CAPACITY = 12
AGES = [0, 1, 2, 3, 10, 11, 12, 13, 24, 120]  # before, at and after every border
SINKS = [3, 3, 3, 3, 0, 3, 1, 5, 3, 2]


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(257, (count,), generator=torch.Generator().manual_seed(seed))


def aged(model: Llama) -> tuple[Slabs, list[int]]:
    """Sessions of every age, in slabs with gaps between them."""
    slabs = model.slabs(sessions=13, capacity=CAPACITY)
    slots = []
    for row, (age, sinks) in enumerate(zip(AGES, SINKS, strict=True)):
        slots.append(slabs.allocate(sinks))
        if row in (2, 5):
            slabs.allocate(4)
        if age:
            model.prefill(tokens(age, row).to(slabs.keys_LNHCD.device), slabs, slots[-1])
    return slabs, slots


def check_steps(model: Llama, tolerance: float) -> None:
    """Changing batches, in any order, so that every session also sits out while others decode."""
    eager, slots = aged(model)
    static, _ = aged(model)
    decode = BucketDecoder(model, static)
    generator = torch.Generator().manual_seed(3)
    for step in range(30):
        count = int(torch.randint(1, len(slots) + 1, (1,), generator=generator))
        batch = [slots[i] for i in torch.randperm(len(slots), generator=generator)[:count]]
        fed = tokens(count, 100 + step).to(eager.keys_LNHCD.device)
        expected, found = model.decode(fed, eager, batch), decode(fed, batch)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        if step % 10 == 5:  # a session that sat out reads a chunk
            for slabs in (eager, static):
                model.prefill(fed[:1].repeat(5), slabs, slots[step % 7], logits="none")
    assert [static.length(slot) for slot in slots] == [eager.length(slot) for slot in slots]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_eager_step(kv_heads: int) -> None:
    check_steps(tiny_llama(num_kv_heads=kv_heads), 1e-9)


def test_no_shape_and_no_branch_depends_on_the_sessions() -> None:
    """One traced graph, made of other sessions, gives every batch its logits."""
    model = tiny_llama()
    slabs, _ = aged(model)
    frequencies_F, scale = model.rotary(torch.device("cpu"))

    def step(
        tokens_b: Tensor, lengths_b: Tensor, sinks_b: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        slabs.keys_LNHCD, slabs.values_LNHCD = keys, values
        attend = BucketAttention(slabs, lengths_b, sinks_b, 8, frequencies_F, scale)
        return model.logits(model.run(tokens_b, attend))

    count, memory = slabs.count, (slabs.keys_LNHCD, slabs.values_LNHCD)
    zeros = torch.zeros(3, count, dtype=torch.long)  # a row each: one tensor would be one input
    traced = make_fx(step)(*zeros, *(part.clone() for part in memory))
    slabs.keys_LNHCD, slabs.values_LNHCD = memory
    lengths = torch.tensor([slabs.length(slot) for slot in range(count)])
    sinks = torch.tensor([slabs.sinks(slot) for slot in range(count)])
    fed = tokens(count)
    expected = model.decode(fed, slabs, list(range(count)))
    found = traced(fed, lengths, sinks, *memory)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_buckets_are_few() -> None:
    assert [bucket(n, 13) for n in (0, 1, 2, 3, 5, 8, 9, 13)] == [0, 1, 2, 4, 8, 8, 13, 13]


def test_a_session_twice_is_refused() -> None:
    model = tiny_llama()
    slabs, slots = aged(model)
    with pytest.raises(ValueError, match="twice"):
        BucketDecoder(model, slabs)(tokens(2), slots[:1] * 2)


@pytest.mark.gpu
def test_graphs_equal_the_eager_step_on_cuda() -> None:
    check_steps(tiny_llama().cuda(), 1e-9)
