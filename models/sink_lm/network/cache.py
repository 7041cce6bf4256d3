"""Static cache memory of many sessions.

Each session has a slab: the keys and values of S sink tokens, then a ring of recent tokens.

Legend: L layers, N slabs, H key/value heads, C slots of a slab, D head width.

The token of stream index t lies in slot t if it is a sink, else in slot S + (t - S) mod R, with
R = C - S. A key is rotated once, at its stream index, and never moved, for attention does not
depend on the order of its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.sink_lm.network.config import LMConfig


class NoFreeSlab(RuntimeError):
    """Every slab has a session."""


class Slabs:
    """Keys and values of up to `sessions` sessions.

    Args:
        cfg: the decoder.
        sessions: number of slabs.
        capacity: tokens a session sees at most, the one being processed included: the paper's
            cache size plus one (its cache of 4 + 1020 attends to 1,025 keys).
        dtype: type of keys and values; the model's own.
        device: where keys and values lie.
        beyond_training: let `capacity` exceed the trained context, to see what dense attention
            does there.

    Raises:
        ValueError: the model was not trained for this capacity.
    """

    def __init__(
        self,
        cfg: LMConfig,
        *,
        sessions: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        beyond_training: bool = False,
    ) -> None:
        limit = min(cfg.max_positions, cfg.sliding_window or cfg.max_positions)
        if capacity < 2 or (capacity > limit and not beyond_training):
            raise ValueError(
                f"capacity {capacity}: positions inside the cache must lie within the {limit} the "
                "model was trained on"
            )
        shape = (cfg.num_layers, sessions, cfg.num_kv_heads, capacity, cfg.head_dim)
        self.keys_LNHCD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LNHCD = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self._lengths = [0] * sessions
        self._sinks = [0] * sessions
        self._free = list(reversed(range(sessions)))

    @property
    def count(self) -> int:
        """Number of slabs."""
        return len(self._lengths)

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self.keys_LNHCD.device

    @property
    def free(self) -> int:
        """Number of slabs without a session."""
        return len(self._free)

    @property
    def bytes_per_session(self) -> int:
        """Bytes of one slab: 2 L H C D times the size of a number."""
        return (self.keys_LNHCD.nbytes + self.values_LNHCD.nbytes) // len(self._lengths)

    def allocate(self, sinks: int) -> int:
        """Takes the lowest free slab, clears it for an empty stream and returns its number.

        Raises:
            NoFreeSlab: every slab has a session.
            ValueError: so many sinks leave no window.
        """
        if not 0 <= sinks <= self.capacity - 2:
            raise ValueError(f"sinks {sinks} must lie between 0 and {self.capacity - 2}")
        if not self._free:
            raise NoFreeSlab(f"all {len(self._lengths)} slabs are in use")
        # The lowest, because neighbouring slabs are read without a copy (attention.py).
        slot = min(self._free)
        self._free.remove(slot)
        # Attention gives empty rows the weight 0, but 0 times a NaN of an earlier session is NaN.
        self.keys_LNHCD[:, slot] = 0
        self.values_LNHCD[:, slot] = 0
        self._lengths[slot], self._sinks[slot] = 0, sinks
        return slot

    def release(self, slot: int) -> None:
        """Frees a slab."""
        if slot in self._free:
            raise ValueError(f"slab {slot} is free already")
        self._lengths[slot], self._sinks[slot] = 0, 0
        self._free.append(slot)

    def length(self, slot: int) -> int:
        """Returns the tokens fed so far."""
        return self._lengths[slot]

    def sinks(self, slot: int) -> int:
        """Returns the number of sink tokens, the first of the stream, which are never evicted."""
        return self._sinks[slot]

    def advance(self, slot: int, tokens: int) -> None:
        """Counts tokens whose keys and values were written."""
        self._lengths[slot] += tokens

    def slot_of(self, slot: int, index: int) -> int:
        """Returns the place in its slab of the token of stream index `index`."""
        sinks = self._sinks[slot]
        return index if index < sinks else sinks + (index - sinks) % (self.capacity - sinks)

    def export(self, slot: int) -> dict[str, Tensor]:
        """Copies a session's state, without rows that are still empty.

        Returns:
            `keys` and `values` [L, H, min(length, C), D], `length` and `sinks` int64 scalars.
        """
        used = min(self._lengths[slot], self.capacity)
        return {
            "keys": self.keys_LNHCD[:, slot, :, :used].clone(),
            "values": self.values_LNHCD[:, slot, :, :used].clone(),
            "length": torch.tensor(self._lengths[slot]),
            "sinks": torch.tensor(self._sinks[slot]),
        }

    def restore(self, slot: int, state: dict[str, Tensor]) -> None:
        """Writes an exported state into an allocated slab of the same capacity.

        Raises:
            ValueError: the state has another shape or type.
        """
        length, sinks = int(state["length"]), int(state["sinks"])
        used = min(length, self.capacity)
        layers, _, heads, _, width = self.keys_LNHCD.shape
        for name in ("keys", "values"):
            given = state[name]
            if given.shape != (layers, heads, used, width) or given.dtype != self.keys_LNHCD.dtype:
                raise ValueError(
                    f"{name} are {given.dtype} {tuple(given.shape)}, this cache takes "
                    f"{self.keys_LNHCD.dtype} {(layers, heads, used, width)}"
                )
        self.keys_LNHCD[:, slot, :, :used] = state["keys"]
        self.values_LNHCD[:, slot, :, :used] = state["values"]
        self._lengths[slot], self._sinks[slot] = length, sinks

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Copies the first tokens of the stream of slab `source` into `target`, an empty one.

        They must be sinks of both, and read by `source`.
        """
        assert tokens <= min(self._lengths[source], self._sinks[source], self._sinks[target])
        for memory in (self.keys_LNHCD, self.values_LNHCD):
            memory[:, target, :, :tokens] = memory[:, source, :, :tokens]
        self._lengths[target] = tokens

    def copy(self, source: int, target: int) -> None:
        """Copies the state of slab `source` into `target`, which must be allocated."""
        used = min(self._lengths[source], self.capacity)
        for memory in (self.keys_LNHCD, self.values_LNHCD):
            memory[:, target, :, :used] = memory[:, source, :, :used]
        self._lengths[target], self._sinks[target] = self._lengths[source], self._sinks[source]
