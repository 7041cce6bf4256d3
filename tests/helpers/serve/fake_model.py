"""The embeddings application around a fake model, and requests to it without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from helpers.serve.embeddings import PATCHES, SIZE, WIDTH, png_uri
from models.media.preprocessing import EncoderInput, Preprocessing
from serve.embeddings.contract import ModelCard
from serve.embeddings.frontend.routes import create_embeddings_app
from serve.embeddings.frontend.service import EmbeddingService
from serve.embeddings.settings import ServeSettings
from serve.embeddings.streams.stream import StreamHub
from serve.ingress.application import IngressParts
from serve.ingress.middleware import RequestMetrics
from serve.replicas.served_model import ServedModel

CARD = ModelCard(
    name="tiny",
    fingerprint="f",
    dimensions=WIDTH,
    num_patches=PATCHES,
    grid=(4, 4),
    preprocessing=Preprocessing(
        image_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, patch_size=SIZE // 4
    ),
)


URI = png_uri(0)


@dataclass(frozen=True)
class Parts:
    """The parts that the application is made of."""

    ingress: IngressParts
    service: EmbeddingService
    streams: StreamHub | None = None

    @property
    def metrics(self) -> RequestMetrics:
        return self.ingress.metrics

    def app(self) -> FastAPI:
        return create_embeddings_app(self.ingress, self.service, self.streams)


async def fake_embed(
    inputs: Sequence[EncoderInput], pooling: str, card: ModelCard = CARD
) -> list[np.ndarray]:
    """Returns the image's mean colour times a ramp, so that values can be traced to the reply."""
    colour = np.array([one.pixels.mean() for one in inputs], np.float32)
    ramp = np.arange(1, WIDTH + 1, dtype=np.float32)
    mean = colour[:, None] * ramp
    return list(mean if pooling == "mean" else np.repeat(mean[:, None], PATCHES, axis=1))


def make_parts(
    embed: Callable[..., Awaitable[list[np.ndarray]]] = fake_embed,
    api_key: str | None = None,
    ready: bool = True,
    **settings: Any,
) -> Parts:
    full = ServeSettings(artifact="a", **settings)

    async def is_ready() -> bool:
        return ready

    async def scrape() -> str:
        return "metrics"

    ingress = IngressParts(settings=full, scrape=scrape, is_ready=is_ready, api_key=api_key)
    return Parts(
        ingress, EmbeddingService(full, ServedModel(CARD), embed, ingress.metrics.registry)
    )


def call(
    parts: Parts, *requests: tuple[str, str, dict[str, Any]], root_path: str = ""
) -> list[httpx.Response]:
    """Sends requests (method, path, httpx arguments), all at once."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(
            parts.app(), raise_app_exceptions=False, root_path=root_path
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            calls = [client.request(method, path, **kw) for method, path, kw in requests]
            return await asyncio.gather(*calls)

    return asyncio.run(run())


def embed(parts: Parts, **body: Any) -> httpx.Response:
    return call(parts, ("POST", "/v1/embeddings", {"json": body}))[0]
