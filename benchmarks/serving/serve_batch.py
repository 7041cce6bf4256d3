"""The embedder with Ray's `@serve.batch` in the place of our batcher, as a peer.

Its options are those of the benchmark with two torch threads: two batches at the same time of at
most 16 images, as our batcher makes them, and a wait of 2 ms.
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve

from serve.embeddings.contract import ModelCard
from serve.embeddings.replica.embedder import Embedder
from serve.embeddings.settings import ServeSettings


class ServeBatchEmbedder(Embedder):
    """As `Embedder`, with another batcher."""

    def __init__(self, settings: ServeSettings, telemetry: Any, card: ModelCard) -> None:
        super().__init__(settings, telemetry, card)
        self._batcher: Any = self

    @ray_serve.batch(max_batch_size=16, batch_wait_timeout_s=0.002, max_concurrent_batches=2)
    async def submit(self, items: list[Any]) -> list[Any]:
        """Runs a batch that `@serve.batch` has collected."""
        return await self._run(items)
