"""Calls the embedder from an ingress replica, again if its replica dies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import Floats, Pooling
from serve.ingress.errors import queue_full, server_error

ATTEMPTS = 3
"""Calls made for one request when embedder replicas die while they serve it."""


class EmbedderClient:
    """Calls the embedder deployment and turns its failures into API errors.

    Args:
        handle: Serve handle of `Embedder`.
    """

    def __init__(self, handle: Any) -> None:
        self._embed = handle.embed

    async def embed(self, inputs: Sequence[EncoderInput], pooling: Pooling) -> list[Floats]:
        """See `Embedder.embed`. The call is repeated if a replica dies, which is safe.

        Raises:
            ApiError: 429 if the embedder's queue is full, 503 if there is no embedder.
        """
        for _ in range(ATTEMPTS):
            try:
                embeddings: list[Floats] = await self._embed.remote(inputs, pooling)
                return embeddings
            except RayActorError:
                continue
            except BackPressureError as error:
                raise queue_full() from error
            except DeploymentUnavailableError:
                break
        raise server_error(503, "no_replica", "no model replica could take the request")
