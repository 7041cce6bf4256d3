"""A decode step of static shapes, which a CUDA graph can hold: `Llama.decode` by bucket.

A step covers slabs 0 to b - 1, whether they generate or not, and the whole capacity of each; b is
one of a short list of sizes. A slab that does not generate reads a meaningless token into the slot
of its next token. No query sees that slot before the next token overwrites it, so that nothing has
to be undone.

Legend: B sessions of a batch, N slabs, b slabs of a bucket, V vocabulary, H key/value heads,
G query heads of a group, D head width, C slots of a slab, S slots that may be sinks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.rope import rotation


class BucketAttention:
    """`DecodeAttention` with shapes that do not depend on the sessions.

    Args:
        slabs: the memory.
        lengths_b: int64, tokens fed so far.
        sinks_b: int64, at most `sink_slots` each.
        sink_slots: S.
        frequencies_F: float64 [D / 2].
        scale: factor on rotated heads.
    """

    def __init__(
        self,
        slabs: Slabs,
        lengths_b: Tensor,
        sinks_b: Tensor,
        sink_slots: int,
        frequencies_F: Tensor,
        scale: float,
    ) -> None:
        self._slabs, self._sink_slots = slabs, sink_slots
        self._dtype, capacity = slabs.keys_LNHCD.dtype, slabs.capacity
        inside_b = lengths_b.clamp(max=capacity - 1)
        self._rotate = rotation(lengths_b, frequencies_F, scale, self._dtype)
        self._rotate_for_sinks = rotation(inside_b, frequencies_F, scale, self._dtype)
        ring_b = sinks_b + (lengths_b - sinks_b) % (capacity - sinks_b)
        self._writes_b = torch.where(lengths_b < sinks_b, lengths_b, ring_b)
        self._rows_b = torch.arange(len(lengths_b), device=lengths_b.device)
        slots_C = torch.arange(capacity, device=lengths_b.device)
        self._is_empty_b11C = (slots_C > lengths_b[:, None])[:, None, None]
        self._is_sink_b11S = (slots_C[:sink_slots] < sinks_b[:, None])[:, None, None]

    def __call__(self, layer: int, q_bHD: Tensor, k_bHD: Tensor, v_bHD: Tensor) -> Tensor:
        """Writes the new keys and values, then attends; see `DecodeAttention`."""
        size, heads, width = k_bHD.shape
        keys_bHCD = self._slabs.keys_LNHCD[layer, :size]
        values_bHCD = self._slabs.values_LNHCD[layer, :size]
        keys_bHCD[self._rows_b, :, self._writes_b] = self._rotate(k_bHD)
        values_bHCD[self._rows_b, :, self._writes_b] = v_bHD
        scaled_bHD = q_bHD * width**-0.5
        window_q = self._rotate(scaled_bHD).view(size, heads, -1, width)
        scores_bHGC = window_q @ keys_bHCD.mT
        if self._sink_slots:
            sink_q = self._rotate_for_sinks(scaled_bHD).view(size, heads, -1, width)
            as_sinks_bHGS = sink_q @ keys_bHCD[:, :, : self._sink_slots].mT
            in_window_bHGS = scores_bHGC[..., : self._sink_slots]
            in_window_bHGS.copy_(torch.where(self._is_sink_b11S, as_sinks_bHGS, in_window_bHGS))
        scores_bHGC.masked_fill_(self._is_empty_b11C, -torch.inf)
        wide = torch.promote_types(self._dtype, torch.float32)
        weights_bHGC = torch.softmax(scores_bHGC, dim=-1, dtype=wide).to(self._dtype)
        return (weights_bHGC @ values_bHCD).flatten(1)


class BucketDecoder:
    """Decodes by bucket: on CUDA with a graph per bucket, captured when first needed.

    On other devices it runs eagerly.

    Args:
        model: the decoder.
        slabs: the cache of every call.
    """

    def __init__(self, model: Llama, slabs: Slabs) -> None:
        self._model, self._slabs = model, slabs
        self._device = slabs.device
        # A graph always reads its tokens, lengths and sinks from the memory it was captured with.
        self._inputs_3N = torch.zeros(3, slabs.count, dtype=torch.int64, device=self._device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor, slots: Sequence[int]) -> Tensor:
        """Does what `Llama.decode` does: same arguments, results, errors and effects."""
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} name a session twice")
        size = bucket(max(slots) + 1, self._slabs.count)
        sinks = [self._slabs.sinks(slot) for slot in range(size)]
        lengths = [self._slabs.length(slot) for slot in range(size)]
        sink_slots = bucket(max(sinks), self._slabs.capacity)
        slots_B = torch.tensor(slots, device=self._device)
        self._inputs_3N[1:, :size] = torch.tensor([lengths, sinks], device=self._device)
        self._inputs_3N[0, slots_B] = tokens_B
        logits_bV = self._run(size, sink_slots)
        for slot in slots:
            self._slabs.advance(slot, 1)
        return logits_bV[slots_B]

    def _run(self, size: int, sink_slots: int) -> Tensor:
        if self._device.type != "cuda":
            return self._step(size, sink_slots)
        if (size, sink_slots) not in self._graphs:
            self._graphs[size, sink_slots] = self._capture(size, sink_slots)
        graph, logits_bV = self._graphs[size, sink_slots]
        graph.replay()
        return logits_bV

    def _step(self, size: int, sink_slots: int) -> Tensor:
        """Computes the step; the values of its inputs change no shape and no control flow."""
        tokens_b, lengths_b, sinks_b = self._inputs_3N[:, :size]
        frequencies_F, scale = self._model.rotary(self._device)
        attend = BucketAttention(self._slabs, lengths_b, sinks_b, sink_slots, frequencies_F, scale)
        return self._model.logits(self._model.run(tokens_b, attend))

    def _capture(self, size: int, sink_slots: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Captures the step. Running it twice before only writes the same keys again."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up on first use
                self._step(size, sink_slots)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits_bV = self._step(size, sink_slots)
        return graph, logits_bV


def bucket(needed: int, limit: int) -> int:
    """Returns the next power of two, at most `limit`, and 0 for 0: few shapes for many numbers."""
    return min(1 << (needed - 1).bit_length(), limit) if needed else 0
