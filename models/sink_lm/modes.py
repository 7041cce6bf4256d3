"""The four ways to read a stream longer than the cache, on one decoder (Xiao et al. 2023, figure 1).

dense keeps every token; window the last C; sink the first S and the last C - S; recompute reads the
last C again, from nothing, for every token. The first three are one cache with other numbers.

Legend: T tokens of a stream, V vocabulary, N sampled places.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.llama import Llama

ModeName = Literal["dense", "window", "sink", "recompute"]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to read."""

    name: ModeName
    """Which of the four."""
    cache: int
    """Tokens kept besides the current one (the paper's S + W); for `dense` the stream's length."""
    sinks: int = 0
    """How many of them are the stream's first."""

    def slabs(self, model: Llama) -> Slabs:
        """Memory for one stream."""
        capacity, dense = self.cache + 1, self.name == "dense"
        return model.slabs(sessions=1, capacity=capacity, beyond_training=dense)


def stream_losses(
    model: Llama, tokens_T: Tensor, mode: Mode, *, chunk: int = 256
) -> Iterator[Tensor]:
    """Negative log-likelihood of every token after the first, as one uninterrupted stream.

    Chunks change nothing but speed: they equal one token at a time (`Llama.prefill`).

    Args:
        model: the decoder.
        tokens_T: int64 [T].
        mode: any but `recompute`, which has no stream (see `recomputed_losses`).
        chunk: tokens read at once.

    Yields:
        float64 nats, [up to `chunk`] each, T - 1 in all, on the CPU.
    """
    slabs = mode.slabs(model)
    slot = slabs.allocate(mode.sinks)
    tokens_T = tokens_T.to(slabs.device)
    for start in range(0, len(tokens_T) - 1, chunk):
        read_T = tokens_T[start : min(start + chunk, len(tokens_T) - 1)]
        logits_TV = model.prefill(read_T, slabs, slot, logits="all")
        assert logits_TV is not None
        labels_T = tokens_T[start + 1 : start + 1 + len(read_T)]
        yield F.cross_entropy(logits_TV, labels_T, reduction="none").double().cpu()


def recomputed_losses(
    model: Llama, tokens_T: Tensor, places_N: Tensor, *, cache: int
) -> Iterator[Tensor]:
    """Losses of sliding window with re-computation, the paper's oracle, at some places only.

    Each costs a forward pass over `cache` + 1 tokens, which is why it is sampled.

    Args:
        model: the decoder.
        tokens_T: int64 [T].
        places_N: indices of the tokens to predict, from 1.
        cache: tokens read besides the one before the place.

    Yields:
        float64 nats, one scalar a place, on the CPU.
    """
    slabs = model.slabs(sessions=1, capacity=cache + 1)
    tokens_T = tokens_T.to(slabs.device)
    for place in places_N.tolist():
        slot = slabs.allocate(0)
        logits_V = model.prefill(tokens_T[max(0, place - cache - 1) : place], slabs, slot)
        assert logits_V is not None
        slabs.release(slot)
        yield F.cross_entropy(logits_V, tokens_T[place]).double().cpu()


def seconds_per_token(model: Llama, tokens_T: Tensor, mode: Mode, *, steps: int = 32) -> float:
    """Median time of one decoded token once the cache is full.

    Args:
        model: the decoder.
        tokens_T: int64 [T], more than the cache holds or the cache is as full as T makes it.
        mode: any of the four.
        steps: tokens timed (recompute: an eighth of them).
    """
    slabs = mode.slabs(model)
    slot = slabs.allocate(mode.sinks)
    tokens_T = tokens_T.to(slabs.device)
    held_T = tokens_T[: mode.cache + 1][:-steps] if mode.name == "dense" else tokens_T[: mode.cache]
    for part_T in torch.split(held_T, 256):
        model.prefill(part_T, slabs, slot, logits="none")
    times: list[float] = []
    for step in range(max(steps // 8, 3) if mode.name == "recompute" else steps):
        started = now(slabs.device)
        if mode.name == "recompute":
            slabs.release(slot)
            slot = slabs.allocate(0)
            model.prefill(tokens_T[step : step + mode.cache + 1], slabs, slot)
        else:
            model.decode(tokens_T[step : step + 1], slabs, [slot])
        times.append(now(slabs.device) - started)
    return float(torch.tensor(times).median())


def now(device: torch.device) -> float:
    """A clock in seconds that waits for what the device was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
