"""Calls the embedder from an ingress replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import Floats, ModelCard, Pooling
from serve.replicas.calls import ModelClient, Refusal


class EmbedderClient(ModelClient[ModelCard]):
    """See `ModelClient`.

    Args:
        handle: Serve handle of `Embedder`.
        own: the model that this ingress was deployed with.
        silence_s: seconds without an answer after which another replica is asked, too.
    """

    def __init__(self, handle: Any, own: ModelCard, *, silence_s: float = 15.0) -> None:
        super().__init__(own, silence_s=silence_s)
        self._embed = handle.embed

    async def embed(
        self, inputs: Sequence[EncoderInput], pooling: Pooling, card: ModelCard
    ) -> list[Floats]:
        """See `Embedder.embed`; raises as `ModelClient.ask`."""

        async def call() -> list[Floats] | Refusal[ModelCard]:
            answer: list[Floats] | Refusal[ModelCard] = await self._embed.remote(
                inputs, pooling, card.fingerprint
            )
            return answer

        return await self.ask(call)
