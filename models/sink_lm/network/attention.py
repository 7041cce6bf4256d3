"""Attention over sink tokens and a ring of recent ones, for one token of many sessions or a chunk.

Token t sees the S sinks and the W = R - 1 tokens before it, with positions counted inside the cache
(Xiao et al. 2023, section 3.2). Inside the window these give true distances, so that keys and
queries rotated at their stream index give the right score. A sink is nearer inside the cache than
in the stream: for it the query is rotated at its position inside the cache, min(t, S + W). No key
is ever rotated again.

Legend: B sessions, T tokens of a chunk, H key/value heads, G query heads of a group, D head width,
C slots of a slab, S sinks, P ring slots in use, K = S + P + T keys of a chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.rope import Rotation, rotation


class SinkAttention:
    """The rotations of a decode batch or a chunk, which are known before the first layer.

    Args:
        slabs: the memory.
        positions_B: int64 stream indices of the queries.
        last: the largest of them.
        frequencies_F: float64 [D / 2].
        scale: factor on rotated heads.
    """

    def __init__(
        self, slabs: Slabs, positions_B: Tensor, last: int, frequencies_F: Tensor, scale: float
    ) -> None:
        self.slabs = slabs
        dtype, width = slabs.keys_LNHCD.dtype, slabs.keys_LNHCD.shape[-1]
        # A query's rotation also divides by the square root of D.
        query_scale = scale * width**-0.5
        self.rotate_key = rotation(positions_B, frequencies_F, scale, dtype)
        self.rotate_query = rotation(positions_B, frequencies_F, query_scale, dtype)
        # Before tokens are evicted, the sinks' positions inside the cache are those in the stream.
        self.rotate_for_sinks: Rotation | None = None
        if last >= slabs.capacity:
            inside_B = positions_B.clamp(max=slabs.capacity - 1)
            self.rotate_for_sinks = rotation(inside_B, frequencies_F, query_scale, dtype)


class DecodeAttention(SinkAttention):
    """One token of each session.

    Args:
        slots: slab numbers, ascending.
        slabs: the memory; see also `SinkAttention`.
        frequencies_F: float64 [D / 2].
        scale: factor on rotated heads.
    """

    def __init__(
        self, slots: Sequence[int], slabs: Slabs, frequencies_F: Tensor, scale: float
    ) -> None:
        device = slabs.device
        lengths = [slabs.length(slot) for slot in slots]
        positions_B = torch.tensor(lengths, device=device)
        super().__init__(slabs, positions_B, max(lengths), frequencies_F, scale)
        self._slots_B = torch.tensor(slots, device=device)
        writes = [slabs.slot_of(slot, length) for slot, length in zip(slots, lengths, strict=True)]
        self._writes_B = torch.tensor(writes, device=device)
        self._runs = [_Run(slabs, rows, [slots[row] for row in rows]) for rows in neighbours(slots)]

    def __call__(self, layer: int, q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Tensor:
        """Writes the new keys and values, then attends.

        Args:
            layer: number of the layer.
            q_BHD: queries [B, H * G, D], not yet rotated.
            k_BHD: keys [B, H, D], not yet rotated.
            v_BHD: values [B, H, D].

        Returns:
            [B, H * G * D].
        """
        keys, values = self.slabs.keys_LNHCD[layer], self.slabs.values_LNHCD[layer]
        keys[self._slots_B, :, self._writes_B] = self.rotate_key(k_BHD)
        values[self._slots_B, :, self._writes_B] = v_BHD
        window_q = self.rotate_query(q_BHD)
        sink_q = self.rotate_for_sinks(q_BHD) if self.rotate_for_sinks else None
        parts = [self._attend(run, keys, values, window_q, sink_q) for run in self._runs]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).flatten(1)

    def _attend(
        self, run: _Run, keys: Tensor, values: Tensor, window_q: Tensor, sink_q: Tensor | None
    ) -> Tensor:
        keys_bCD, values_bCD = run.view(keys), run.view(values)
        scores_bGC = torch.bmm(run.grouped(window_q), keys_bCD.mT)
        if sink_q is not None and run.sinks:
            sinks_bGS = torch.bmm(run.grouped(sink_q), keys_bCD[:, : run.sinks].mT)
            if run.is_sink_bS is not None:
                sinks_bGS = torch.where(run.is_sink_bS, sinks_bGS, scores_bGC[..., : run.sinks])
            scores_bGC[..., : run.sinks] = sinks_bGS
        if run.is_empty_bC is not None:
            scores_bGC.masked_fill_(run.is_empty_bC, -torch.inf)
        # torch sums a softmax of half-width numbers in float32.
        out_bGD = torch.bmm(torch.softmax(scores_bGC, dim=-1), values_bCD)
        return out_bGD.view(len(run.rows), -1, out_bGD.shape[-1])


class _Run:
    """Sessions in neighbouring slabs: one view reads their memory without a copy.

    Attributes:
        rows: their rows of the batch, a range.
        sinks: the largest number of sinks among them.
        is_sink_bS: bool [b * H, 1, sinks], None when all have as many.
        is_empty_bC: bool [b * H, 1, C in use], None when all slots in use are full.
    """

    def __init__(self, slabs: Slabs, rows: range, slots: list[int]) -> None:
        self.rows = rows
        self._first = slots[0]
        sinks = [slabs.sinks(slot) for slot in slots]
        valid = [min(slabs.length(slot) + 1, slabs.capacity) for slot in slots]
        self.sinks, self._used = min(max(sinks), max(valid)), max(valid)
        heads = self._heads = slabs.keys_LNHCD.shape[2]
        device = slabs.device

        def below(limits: list[int], size: int) -> Tensor:
            limits_b = torch.tensor(limits, device=device).repeat_interleave(heads)
            return torch.arange(size, device=device) < limits_b[:, None, None]

        self.is_sink_bS = None if len(set(sinks)) == 1 else below(sinks, self.sinks)
        self.is_empty_bC = None if len(set(valid)) == 1 else ~below(valid, self._used)

    def view(self, memory_NHCD: Tensor) -> Tensor:
        """Returns the used part of their slabs as [b * H, C in use, D]."""
        mine = memory_NHCD[self._first : self._first + len(self.rows)]
        return mine.flatten(0, 1)[:, : self._used]

    def grouped(self, q_BHD: Tensor) -> Tensor:
        """Returns their queries as [b * H, G, D]: a group's heads share one matrix product."""
        mine = q_BHD[self.rows.start : self.rows.stop]
        return mine.reshape(len(self.rows) * self._heads, -1, mine.shape[-1])


def neighbours(slots: Sequence[int]) -> list[range]:
    """Splits ascending slab numbers into ranges of rows whose slabs are neighbours."""
    starts = [0, *(i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1), len(slots)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


class ChunkAttention(SinkAttention):
    """Attention of a chunk of one session's next tokens, as if they came one by one.

    A token's keys and values are never revised, so that a chunk is one masked attention over the
    sinks, the ring as it was before the chunk, and the chunk itself.

    Args:
        slot: slab number.
        tokens: length of the chunk.
        slabs: the memory; see also `SinkAttention`.
        frequencies_F: float64 [D / 2].
        scale: factor on rotated heads.

    Attributes:
        tokens: length of the chunk.
    """

    def __init__(
        self, slot: int, tokens: int, slabs: Slabs, frequencies_F: Tensor, scale: float
    ) -> None:
        device = slabs.device
        start, self._sinks = slabs.length(slot), slabs.sinks(slot)
        positions_T = torch.arange(start, start + tokens, device=device)
        super().__init__(slabs, positions_T, start + tokens - 1, frequencies_F, scale)
        self._slot, self.tokens = slot, tokens
        ring = slabs.capacity - self._sinks
        # Rows of the chunk that are sinks, and rows that are still in the ring after the chunk.
        self._sink_rows = slice(0, min(max(self._sinks - start, 0), tokens))
        self._sink_slots = slice(min(start, self._sinks), min(start + tokens, self._sinks))
        self._ring_rows = slice(max(self._sink_rows.stop, tokens - ring), tokens)
        self._ring_slots = self._sinks + (positions_T[self._ring_rows] - self._sinks) % ring
        self._ring_used = min(max(start - self._sinks, 0), ring)
        self._is_hidden_TK = ~self._visible(positions_T, start, ring)

    def _visible(self, positions_T: Tensor, start: int, ring: int) -> Tensor:
        """Returns bool [T, K]: the keys of sinks, ring and chunk that each token sees."""
        sinks, device = self._sinks, positions_T.device
        last = (
            start - 1 - sinks
        )  # ring index of the newest token in the ring, counted from the first
        place_P = torch.arange(self._ring_used, device=device)
        held_P = sinks + last - (last - place_P) % ring
        now = positions_T[:, None]
        sees_sink_TS = torch.arange(sinks, device=device) <= now
        sees_held_TP = held_P >= now - (ring - 1)
        sees_new_TT = (
            (positions_T <= now) & (positions_T >= now - (ring - 1)) & (positions_T >= sinks)
        )
        return torch.cat((sees_sink_TS, sees_held_TP, sees_new_TT), dim=1)

    def __call__(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """Attends, and writes the keys and values that stay.

        Args:
            layer: which layer's memory.
            q_THD: queries [T, H * G, D], not yet rotated.
            k_THD: keys [T, H, D], not yet rotated.
            v_THD: values [T, H, D].

        Returns:
            [T, H * G * D].
        """
        keys_HCD = self.slabs.keys_LNHCD[layer, self._slot]
        values_HCD = self.slabs.values_LNHCD[layer, self._slot]
        new_keys_HTD, new_values_HTD = self.rotate_key(k_THD).transpose(0, 1), v_THD.transpose(0, 1)
        keys_HCD[:, self._sink_slots] = new_keys_HTD[:, self._sink_rows]
        values_HCD[:, self._sink_slots] = new_values_HTD[:, self._sink_rows]

        window_q = self._grouped(self.rotate_query(q_THD), len(keys_HCD))
        sink_q = window_q
        if self.rotate_for_sinks:
            sink_q = self._grouped(self.rotate_for_sinks(q_THD), len(keys_HCD))
        ring_used = slice(self._sinks, self._sinks + self._ring_used)
        parts = [
            sink_q @ keys_HCD[:, : self._sinks].mT,
            window_q @ keys_HCD[:, ring_used].mT,
            window_q @ new_keys_HTD.mT,
        ]
        scores_HRK = torch.cat(parts, dim=-1)
        by_token_HGTK = scores_HRK.view(len(keys_HCD), -1, *self._is_hidden_TK.shape)
        by_token_HGTK.masked_fill_(self._is_hidden_TK, -torch.inf)
        sizes = [part.shape[-1] for part in parts]
        on_sinks, on_ring, on_new = torch.split(torch.softmax(scores_HRK, -1), sizes, dim=-1)
        out_HRD = on_sinks @ values_HCD[:, : self._sinks]
        out_HRD += on_ring @ values_HCD[:, ring_used]
        out_HRD += on_new @ new_values_HTD

        self._store(layer, new_keys_HTD, new_values_HTD)
        out_HGTD = out_HRD.view(len(keys_HCD), -1, len(q_THD), out_HRD.shape[-1])
        return out_HGTD.permute(2, 0, 1, 3).flatten(1)

    def _store(self, layer: int, new_keys_HTD: Tensor, new_values_HTD: Tensor) -> None:
        """Writes what is still in the ring after the chunk."""
        for memory_LNHCD, new_HTD in (
            (self.slabs.keys_LNHCD, new_keys_HTD),
            (self.slabs.values_LNHCD, new_values_HTD),
        ):
            memory_LNHCD[layer, self._slot][:, self._ring_slots] = new_HTD[:, self._ring_rows]

    @staticmethod
    def _grouped(q_THD: Tensor, heads: int) -> Tensor:
        """Reshapes [T, H * G, D] to [H, G * T, D]."""
        q_THGD = q_THD.view(len(q_THD), heads, -1, q_THD.shape[-1])
        return q_THGD.permute(1, 2, 0, 3).flatten(1, 2)


class DraftAttention(ChunkAttention):
    """A chunk of guesses: the slab stays as it is until `keep` accepts the tokens one by one.

    Written at once, a guess would overwrite the token that leaves the window for it.

    Args:
        slot: slab number, whose sinks are all read.
        tokens: length of the chunk, shorter than the ring.
        slabs: the memory; see also `SinkAttention`.
        frequencies_F: float64 [D / 2].
        scale: factor on rotated heads.
    """

    def __init__(
        self, slot: int, tokens: int, slabs: Slabs, frequencies_F: Tensor, scale: float
    ) -> None:
        super().__init__(slot, tokens, slabs, frequencies_F, scale)
        assert slabs.length(slot) >= slabs.sinks(slot)
        assert tokens < slabs.capacity - slabs.sinks(slot)
        self._new: list[tuple[Tensor, Tensor]] = []
        self._kept = 0

    def _store(self, layer: int, new_keys_HTD: Tensor, new_values_HTD: Tensor) -> None:
        self._new.append((new_keys_HTD, new_values_HTD))

    def keep(self) -> None:
        """Writes the chunk's next token and counts it."""
        place = self.slabs.slot_of(self._slot, self.slabs.length(self._slot))
        memories = (self.slabs.keys_LNHCD, self.slabs.values_LNHCD)
        for memory_LNHCD, new in zip(memories, zip(*self._new, strict=True), strict=True):
            rows = [new_HTD[:, self._kept] for new_HTD in new]
            memory_LNHCD[:, self._slot, :, place] = torch.stack(rows)
        self._kept += 1
        self.slabs.advance(self._slot, 1)


class PackedAttention:
    """Chunks of several sessions, one after the other in the same rows.

    Args:
        chunks: of different sessions.
    """

    def __init__(self, chunks: Sequence[ChunkAttention]) -> None:
        self._chunks, self._sizes = chunks, [chunk.tokens for chunk in chunks]

    def __call__(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        """Attends within each session; see `ChunkAttention`."""
        parts = (torch.split(x_THD, self._sizes) for x_THD in (q_THD, k_THD, v_THD))
        mixed = zip(self._chunks, *parts, strict=True)
        return torch.cat([chunk(layer, q, k, v) for chunk, q, k, v in mixed])
