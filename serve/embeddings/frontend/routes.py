"""The FastAPI application of the embeddings server: its routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

from serve.embeddings.contract import ModelCard
from serve.embeddings.frontend.schemas import EmbeddingRequest, EmbeddingResponse, Model
from serve.embeddings.frontend.service import EmbeddingService
from serve.embeddings.streams.routes import add_stream_route
from serve.embeddings.streams.stream import StreamHub
from serve.ingress.application import IngressParts, create_app
from serve.ingress.bodies import answer_in_time, check_content_type, describe_body
from serve.replicas.model_routes import add_model_routes


def create_embeddings_app(
    parts: IngressParts, service: EmbeddingService, streams: StreamHub | None = None
) -> FastAPI:
    """Returns the application of one replica.

    Args:
        parts: what every application needs.
        service: answers embedding requests; it is closed with the application.
        streams: shared by the live streams of this replica; None serves no streams.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    async def find_model(name: str | None) -> Model:
        return _model(service, service.model.named(name))

    def add_routes(app: FastAPI) -> None:
        _add_embedding_route(app, service)
        add_model_routes(app, Model, find_model)
        if streams is not None:
            add_stream_route(app, streams)

    return create_app(
        parts,
        add_routes,
        summary="Image and video embeddings in the OpenAI shape.",
        max_requests=service.settings.max_queued,  # every request has at least one image
        lifespan=lifespan,
    )


def _add_embedding_route(app: FastAPI, service: EmbeddingService) -> None:
    @app.post(
        "/v1/embeddings",
        response_model=None,
        responses={200: {"model": EmbeddingResponse}},
        openapi_extra=describe_body(EmbeddingRequest),
    )
    async def create_embeddings(request: Request) -> Response:
        """Returns the embedding of one image or video, or of each in a list."""
        check_content_type(request)
        service.admission.check(1)  # refuse before reading a body
        return await answer_in_time(request, service.answer, service.settings.timeout_s)


def _model(service: EmbeddingService, card: ModelCard) -> Model:
    prep = card.preprocessing
    return Model(
        id=card.name,
        created=service.created,
        fingerprint=card.fingerprint,
        dimensions=card.dimensions,
        num_patches=card.num_patches,
        image_size=prep.image_size if isinstance(prep.image_size, int) else list(prep.image_size),
        grid=list(card.grid),
        fit=prep.fit,
        exclude=[list(region) for region in prep.exclude],
        modality="image" if card.frames == 1 else "video",
        frames=card.frames,
        tubelet=card.tubelet,
        alignment=card.alignment,
        surprise=card.surprise,
    )
