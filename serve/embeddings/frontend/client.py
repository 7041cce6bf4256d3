"""Calls the embedder from an ingress replica, again if a replica dies or has another model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import Floats, ModelCard, OtherModel, Pooling, Refusal
from serve.ingress.errors import queue_full, server_error
from serve.ingress.patience import first_answer

ATTEMPTS = 3
"""Calls made for one request when embedder replicas die or are silent while they serve it."""

MATCHING = 12
"""Calls made to find a replica of the model that a request was prepared for. Serve's router takes
one of the replicas at random, so with one of two it is found but for once in 4,096 times."""

LONGEST_PAUSE_S = 0.05


class EmbedderClient:
    """Calls the embedder deployment and turns its failures into API errors.

    Args:
        handle: Serve handle of `Embedder`.
        own: the model that this ingress was deployed with.
        silence_s: seconds without an answer after which another replica is asked, too.
    """

    def __init__(self, handle: Any, own: ModelCard, *, silence_s: float = 15.0) -> None:
        self._embed, self._own, self._silence_s = handle.embed, own, silence_s

    async def embed(
        self, inputs: Sequence[EncoderInput], pooling: Pooling, card: ModelCard
    ) -> list[Floats]:
        """See `Embedder.embed`. It is repeated if a replica dies or is silent, which is safe.

        Raises:
            ApiError: 429 if the embedder's queue is full, 503 if there is no embedder.
            OtherModel: no replica of the model was found, or one of this ingress's own model.
        """
        tried = 0
        while isinstance(found := await self._call(inputs, pooling, card.fingerprint), Refusal):
            tried += 1
            if found.card == self._own or tried == MATCHING:
                raise OtherModel(found.card)
            await asyncio.sleep(min(LONGEST_PAUSE_S, 0.005 * tried))
        return found

    async def _call(
        self, inputs: Sequence[EncoderInput], pooling: Pooling, fingerprint: str
    ) -> list[Floats] | Refusal:
        async def call() -> list[Floats] | Refusal:
            answer: list[Floats] | Refusal = await self._embed.remote(inputs, pooling, fingerprint)
            return answer

        try:
            return await first_answer(call, calls=ATTEMPTS, silence_s=self._silence_s)
        except BackPressureError as error:
            raise queue_full() from error
        except (RayActorError, DeploymentUnavailableError) as error:
            message = "no model replica could take the request"
            raise server_error(503, "no_replica", message) from error
