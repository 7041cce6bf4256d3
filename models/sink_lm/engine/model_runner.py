"""Runs the decoder over the sessions' slabs: prompts by chunk, generated tokens by batch.

Legend: T tokens of a chunk, B sessions of a batch, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.sink_lm.engine.sampling import Choice, scored
from models.sink_lm.network.attention import DraftAttention
from models.sink_lm.network.buckets import BucketDecoder
from models.sink_lm.network.llama import Llama

SCORED_ROWS = 32
"""Tokens of a prompt whose logits are in memory at the same time."""


class ModelRunner:
    """The decoder with the slabs that it reads and writes.

    Args:
        model: the decoder.
        sessions: slabs.
        capacity: tokens a session sees at most, see `Slabs`.
        by_bucket: decode with static shapes, on CUDA as graphs (models/sink_lm/network/buckets.py).
    """

    def __init__(self, model: Llama, *, sessions: int, capacity: int, by_bucket: bool) -> None:
        self.model = model
        self.slabs = model.slabs(sessions=sessions, capacity=capacity)
        self._bucket_decoder = BucketDecoder(model, self.slabs) if by_bucket else None

    def read(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> list[Tensor]:
        """Reads T tokens of a prompt into each of several slabs, in one pass.

        Returns:
            The last layer's output for each, [T, E].
        """
        tokens = [self._on_device(prompt) for prompt in prompts]
        return self.model.read_packed(tokens, self.slabs, slots)

    def decode(self, tokens: Sequence[int], slots: list[int]) -> Tensor:
        """Reads one token into each of B slabs.

        Returns:
            Logits of the tokens after them, float [B, V].
        """
        tokens_B = self._on_device(tokens)
        if self._bucket_decoder is not None:
            return self._bucket_decoder(tokens_B, slots)
        return self.model.decode(tokens_B, self.slabs, slots)

    def look_ahead(self, tokens: Sequence[int], slot: int) -> tuple[Tensor, DraftAttention] | None:
        """Reads T tokens of which only the first is sure; see `Llama.look_ahead`.

        Returns:
            None where the slab is not ready for that: its sinks are not all read, or its ring is
            shorter.
        """
        sinks = self.slabs.sinks(slot)
        if self.slabs.length(slot) < sinks or len(tokens) >= self.slabs.capacity - sinks:
            return None
        return self.model.look_ahead(self._on_device(tokens), self.slabs, slot)

    def score(self, x_TE: Tensor, after: Sequence[int], count: int) -> Iterator[list[Choice]]:
        """Yields a prompt's tokens with their log probabilities, a few at a time.

        The logits of a whole chunk would be too large.

        Args:
            x_TE: what `read` returned.
            after: T tokens, each the one after the token of its row.
            count: likeliest tokens to report.
        """
        for row in range(0, len(after), SCORED_ROWS):
            rows = slice(row, row + SCORED_ROWS)
            with torch.inference_mode():
                choices = scored(self.model.logits(x_TE[rows]), after[rows], count)
            yield choices

    def _on_device(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens).to(self.slabs.device)
