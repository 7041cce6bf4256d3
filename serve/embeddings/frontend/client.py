"""Calls the embedder from an ingress replica."""

from __future__ import annotations

from collections.abc import Sequence

from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import Floats, ModelCard, Pooling
from serve.replicas.calls import ModelClient, Refusal


class EmbedderClient(ModelClient[ModelCard]):
    """See `ModelClient`."""

    async def embed(
        self, inputs: Sequence[EncoderInput], pooling: Pooling, card: ModelCard
    ) -> list[Floats]:
        """See `Embedder.embed`; raises as `ModelClient.ask`."""

        async def call() -> list[Floats] | Refusal[ModelCard]:
            answer: list[Floats] | Refusal[ModelCard] = await self.model.call(
                "embed", inputs, pooling, card.fingerprint
            )
            return answer

        return await self.ask(call)
