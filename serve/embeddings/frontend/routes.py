"""The FastAPI application of the embeddings server: its parts and routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response

from serve.embeddings.frontend.service import EmbeddingService
from serve.embeddings.schemas import EmbeddingRequest, EmbeddingResponse, Model, ModelList
from serve.embeddings.streams.route import add_stream_route
from serve.embeddings.streams.stream import StreamHub
from serve.ingress.application import (
    add_gate,
    add_operation_routes,
    check_content_type,
    read_body,
)
from serve.ingress.bodies import describe_body
from serve.ingress.errors import ErrorResponse, server_error
from serve.ingress.gate import RequestMetrics
from serve.ingress.intake import Intake


@dataclass(frozen=True)
class Limits:
    """What one HTTP request may cost."""

    max_request_bytes: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the application is made of.

    Attributes:
        service: answers embedding requests.
        limits: see `Limits`.
        intake: reads bodies.
        metrics: this replica's request metrics.
        scrape: returns the Prometheus text of all replicas.
        is_ready: whether a model replica is up.
        api_key: what clients must present everywhere but on `OPEN_PATHS`; None serves anyone.
        streams: what the streams of this replica share; None serves none.
        cors_origins: pages that may call it from a browser.
    """

    service: EmbeddingService
    limits: Limits
    intake: Intake
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    scrape: Callable[[], Awaitable[str]]
    is_ready: Callable[[], Awaitable[bool]]
    api_key: str | None = None
    streams: StreamHub | None = None
    cors_origins: Sequence[str] = ()


def create_http_app(parts: Parts) -> FastAPI:
    """Builds the application around its parts; everything in it is per replica."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await parts.service.close()

    app = FastAPI(
        title="rayjepa",
        summary="Image and video embeddings in the OpenAI shape.",
        lifespan=lifespan,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    _add_embedding_routes(app, parts)
    add_operation_routes(app, is_ready=parts.is_ready, scrape=parts.scrape)
    if parts.streams is not None:
        add_stream_route(app, parts.streams)
    add_gate(
        app,
        metrics=parts.metrics,
        api_key=parts.api_key,
        intake=parts.intake,
        cors_origins=parts.cors_origins,
    )
    return app


def _add_embedding_routes(app: FastAPI, parts: Parts) -> None:
    service = parts.service

    @app.post(
        "/v1/embeddings",
        response_model=None,
        responses={200: {"model": EmbeddingResponse}},
        openapi_extra=describe_body(EmbeddingRequest),
    )
    async def create_embeddings(request: Request) -> Response:
        """Embeds one image or video, or a list of them."""
        check_content_type(request)
        service.admission.check(1)  # shed load before reading a body
        try:
            async with asyncio.timeout(parts.limits.timeout_s):
                body = await read_body(request, parts.limits.max_request_bytes)
                reply = await service.answer(body)
        except TimeoutError as error:
            message = f"no reply within {parts.limits.timeout_s:g} s"
            raise server_error(504, "timeout", message) from error
        return Response(reply, media_type="application/json")

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """Lists what this server has."""
        return ModelList(data=[_model(service)])

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Model:
        """Describes one model."""
        service.check_model(name)
        return _model(service)


def _model(service: EmbeddingService) -> Model:
    card = service.card
    return Model(
        id=card.name,
        created=card.created,
        dimensions=card.dimensions,
        num_patches=card.num_patches,
        image_size=card.preprocessing.image_size,
        modality="image" if card.frames == 1 else "video",
        frames=card.frames,
        tubelet=card.tubelet,
    )
