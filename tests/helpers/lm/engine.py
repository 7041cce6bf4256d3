"""A tiny engine, requests to it, and a reference without an engine."""

from __future__ import annotations

from helpers.lm.tiny_model import ByteTokenizer, tiny_llama
from models.sink_lm.engine.engine import Engine
from models.sink_lm.engine.generation import Generation
from models.sink_lm.engine.output import End, Token
from models.sink_lm.engine.sampling_params import SamplingParams
from models.sink_lm.network.llama import Llama


def make(model: Llama | None = None, **changes: object) -> Engine:
    settings = {"sessions": 4, "capacity": 24, "prefill_chunk": 5} | changes
    return Engine(model or tiny_llama(), ByteTokenizer(), **settings)  # type: ignore[arg-type]


def ask(count: int | None = 12, **changes: object) -> SamplingParams:
    settings = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True} | changes
    return SamplingParams(**settings)  # type: ignore[arg-type]


def run(engine: Engine, *generations: Generation) -> list[list[Token | End]]:
    found: list[list] = [[] for _ in generations]
    for _ in range(2000):
        worked = engine.tick()
        for events, generation in zip(found, generations, strict=True):
            events += generation.take()
        if not worked or all(generation.done for generation in generations):
            return found
    raise AssertionError("the engine does not come to an end")


def ids(events: list) -> list[int]:
    return [event.token for event in events if isinstance(event, Token)]


def alone(
    prompt: bytes | list[int], count: int, sinks: int = 4, *, capacity: int = 24
) -> list[int]:
    """Returns greedy tokens from `decode` alone, one token at a time."""
    import torch

    model = tiny_llama()
    slabs = model.slabs(sessions=1, capacity=capacity)
    slot, out = slabs.allocate(sinks), list(prompt)
    for index in range(len(prompt) + count - 1):
        logits = model.decode(torch.tensor(out[index : index + 1]), slabs, [slot])
        if index >= len(prompt) - 1:
            out.append(int(logits.argmax()))
    return out[len(prompt) :]
