"""Four ways to read a stream that is longer than the cache (Xiao et al. 2023, figure 1).

`dense` keeps every token, `window` the last C, `sink` the first S and the last C - S. `recompute`
reads the last C again, into an empty cache, for every token. The first three are the same cache
with different sizes.

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
    """One way to read a stream."""

    name: ModeName
    """Which of the four."""
    cache: int
    """Tokens kept besides the current one (S + W in the paper); for `dense` the stream's length."""
    sinks: int = 0
    """How many of them are the stream's first."""

    def slabs(self, model: Llama) -> Slabs:
        """Returns the memory for one stream."""
        capacity, dense = self.cache + 1, self.name == "dense"
        return model.slabs(sessions=1, capacity=capacity, beyond_training=dense)


def stream_losses(
    model: Llama, tokens_T: Tensor, mode: Mode, *, chunk: int = 256
) -> Iterator[Tensor]:
    """Yields the negative log-likelihood of every token after the first, as one stream.

    The chunk size changes the speed only: results equal one token at a time (`Llama.prefill`).

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
    """Yields losses of the sliding window with re-computation, at N places.

    This is the paper's oracle. Each place costs a forward pass over `cache` + 1 tokens.

    Args:
        model: the decoder.
        tokens_T: int64 [T].
        places_N: indices of the tokens to predict, from 1.
        cache: tokens read besides the one before the place.

    Yields:
        float64 nats, one scalar per place, on the CPU.
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
    """Returns the median seconds of one decoded token once the cache is full.

    Args:
        model: the decoder.
        tokens_T: int64 [T]. If T is below the cache size, the cache is only filled to T.
        mode: any of the four.
        steps: tokens timed; an eighth of them for `recompute`.
    """
    slabs = mode.slabs(model)
    slot = slabs.allocate(mode.sinks)
    tokens_T = tokens_T.to(slabs.device)
    cached_T = (
        tokens_T[: mode.cache + 1][:-steps] if mode.name == "dense" else tokens_T[: mode.cache]
    )
    for part_T in torch.split(cached_T, 256):
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
    """Returns a clock's seconds after the device has done its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
