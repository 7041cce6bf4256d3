"""The language model's decode step on a GPU that is not there: all of it there, and no wait for it
that would grow with the layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from helpers.fake_device import GPU, WAITS, HostWait, Watch, fake, fake_gpu, put
from helpers.lm.tiny_model import tiny_llama
from models.sink_lm.network.buckets import BucketDecoder
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.llama import Llama

COPIES_THERE = 12
"""What a step tells the device (tokens, slabs, lengths), whatever the layers: before its first
kernel, when the device has nothing else to do."""


@contextlib.contextmanager
def on_gpu(layers: int) -> Iterator[tuple[Llama, Slabs]]:
    """A model with sessions of two ages, on the fake GPU."""
    model = tiny_llama(num_layers=layers)
    with fake_gpu(), torch.inference_mode():
        put(model)
        slabs = model.slabs(sessions=4, capacity=12)
        for age in (3, 20):
            slabs.advance(slabs.allocate(sinks=2), age)
        model.rotary(GPU)  # kept from the first step on
        yield model, slabs


def decode(model: Llama, slabs: Slabs, copies_there: int = COPIES_THERE) -> Tensor:
    tokens_B = torch.zeros(2, dtype=torch.int64, device=GPU)
    with Watch(copies_there=copies_there):
        return model.decode(tokens_B, slabs, [1, 0])


def graph_step(model: Llama, slabs: Slabs) -> Tensor:
    """The step that a CUDA graph captures, in which any wait is an error."""
    decoder = BucketDecoder(model, slabs)
    with Watch():
        return decoder._step(2, 2)


Step = Callable[[Llama, Slabs], Tensor]
STEPS: dict[str, Step] = {"eager": decode, "graph": graph_step}


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_stays_on_the_device(step: Step, layers: int) -> None:
    with on_gpu(layers) as (model, slabs):
        logits_BV = step(model, slabs)
    assert (logits_BV.device, logits_BV.shape[0]) == (GPU, 2)


def test_so_does_a_chunk_of_a_prompt() -> None:
    with on_gpu(6) as (model, slabs):
        tokens_T = torch.zeros(5, dtype=torch.int64, device=GPU)
        with Watch(copies_there=COPIES_THERE):
            assert model.read(tokens_T, slabs, 1).device == GPU


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_weight_that_stays_behind_is_found(step: Step) -> None:
    with on_gpu(2) as (model, slabs):
        norm = model.layers[1].mlp_norm
        norm.weight = nn.Parameter(fake(norm.weight))
        with pytest.raises(RuntimeError, match="device"):
            step(model, slabs)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_wait_in_a_layer_is_found(step: Step) -> None:
    with on_gpu(2) as (model, slabs):
        model.layers[1].register_forward_hook(lambda module, args, out: out.sum().item() and None)
        with pytest.raises(WAITS):
            step(model, slabs)


def test_copies_are_counted() -> None:
    with on_gpu(1) as (model, slabs), pytest.raises(HostWait):
        decode(model, slabs, copies_there=0)
