"""Calls the embedder from an ingress replica, again if its replica dies or serves another model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import Floats, ModelCard, OtherModel, Pooling, Refusal
from serve.ingress.errors import queue_full, server_error

ATTEMPTS = 3
"""Calls made for one request when embedder replicas die while they serve it."""

MATCHING = 12
"""Calls made to find a replica of the model that a request was prepared for. Serve's router takes
one of the replicas at random, so with one of two it is found but for once in 4,096 times."""

LONGEST_PAUSE_S = 0.05


class EmbedderClient:
    """Calls the embedder deployment and turns its failures into API errors.

    Args:
        handle: Serve handle of `Embedder`.
        own: the model that this ingress was deployed with.
    """

    def __init__(self, handle: Any, own: ModelCard) -> None:
        self._embed, self._own = handle.embed, own

    async def embed(
        self, inputs: Sequence[EncoderInput], pooling: Pooling, card: ModelCard
    ) -> list[Floats]:
        """See `Embedder.embed`. The call is repeated if a replica dies, which is safe.

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
        for _ in range(ATTEMPTS):
            try:
                answer: list[Floats] | Refusal = await self._embed.remote(
                    inputs, pooling, fingerprint
                )
                return answer
            except RayActorError:
                continue
            except BackPressureError as error:
                raise queue_full() from error
            except DeploymentUnavailableError:
                break
        raise server_error(503, "no_replica", "no model replica could take the request")
