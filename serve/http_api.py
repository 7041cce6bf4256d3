"""The FastAPI application: routes, body limits, API key, typed errors, request metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.schemas import (
    ApiError,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorResponse,
    Model,
    ModelList,
    server_error,
)
from serve.service import EmbeddingService
from serve.streams import StreamHub
from serve.streams_api import add_stream_route, refuse
from serve.telemetry import LATENCY_BUCKETS_S

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_PATHS = frozenset({"/healthz", "/metrics", "/docs", "/redoc", "/openapi.json"})
"""What needs no API key: probes, scrapers and the description of the API."""


@dataclass(frozen=True)
class Limits:
    """What one HTTP request may cost."""

    max_request_bytes: int
    timeout_s: float


class RequestMetrics:
    """Counts and times the requests of one replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rayjepa_requests",
            "HTTP requests by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.latency_s = Histogram(
            "rayjepa_request_seconds",
            "Time from the head of a request to the end of its reply",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the application is made of.

    Attributes:
        service: answers embedding requests.
        limits: see `Limits`.
        metrics: this replica's request metrics.
        scrape: returns the Prometheus text of all replicas.
        is_ready: whether a model replica is up.
        api_key: what clients must present everywhere but on `OPEN_PATHS`; None serves anyone.
        streams: what the streams of this replica share; None serves none.
    """

    service: EmbeddingService
    limits: Limits
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    scrape: Callable[[], Awaitable[str]]
    is_ready: Callable[[], Awaitable[bool]]
    api_key: str | None = None
    streams: StreamHub | None = None


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
    add_error_handlers(app)
    _add_embedding_routes(app, parts)
    add_operation_routes(app, is_ready=parts.is_ready, scrape=parts.scrape)
    if parts.streams is not None:
        add_stream_route(app, parts.streams)
    app.add_middleware(Gate, metrics=parts.metrics, api_key=parts.api_key)
    return app


def _add_embedding_routes(app: FastAPI, parts: Parts) -> None:
    service = parts.service

    @app.post(
        "/v1/embeddings",
        response_model=None,
        responses={200: {"model": EmbeddingResponse}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": EmbeddingRequest.model_json_schema()}},
            }
        },
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


Ready = Callable[[], Awaitable[bool]]
Scrape = Callable[[], Awaitable[str]]


def add_operation_routes(app: FastAPI, *, is_ready: Ready, scrape: Scrape) -> None:
    """Adds `/healthz` and `/metrics`.

    Args:
        app: takes the routes.
        is_ready: whether a model replica is up.
        scrape: returns the Prometheus text of all replicas.
    """

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> PlainTextResponse:
        """200 when requests can be served, else 503."""
        if not await is_ready():
            raise server_error(503, "not_ready", "no model replica is running")
        return PlainTextResponse("ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text, summed over all replicas."""
        return Response(await scrape(), media_type=PROMETHEUS_TEXT)


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


def check_content_type(request: Request) -> None:
    """Raises a 415 for anything but plain JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"send application/json, not {content_type or 'an unlabelled body'}"
        raise ApiError(415, "unsupported_content_type", message)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_content_encoding", "send the body uncompressed")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads a body, and stops where it gets too long: a declared length may be absent or wrong."""
    too_long = ApiError(413, "request_too_large", f"the body has more than {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_long
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_long
        chunks.append(chunk)
    return b"".join(chunks)


def error_response(error: ApiError) -> Response:
    """The reply that tells a client of an error."""
    return Response(error.body(), error.status, error.headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of an application a typed one."""

    @app.exception_handler(ApiError)
    async def typed(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        message = f"{error.detail}: {request.method} {request.url.path}"
        headers = dict(error.headers or {})
        return error_response(ApiError(error.status_code, code, message, headers=headers))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        # Starlette raises the error again once this is sent, and Serve logs it under the request's
        # id, which the client has; its text may hold anything and stays with us.
        return error_response(server_error(500, "internal_error", "internal error"))


class Gate:
    """Around every request: the API key, the count and the time.

    Plain ASGI: Starlette's function middleware costs a task per request.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics, api_key: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._api_key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket" and not self._is_allowed(scope):
                websocket = WebSocket(scope, receive, send)
                await websocket.accept()  # or the client would not learn why
                await refuse(websocket, _unauthorized())
                return
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # nothing sent: the client went away

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._is_allowed(scope):
                await self._app(scope, receive, watched_send)
            else:
                await error_response(_unauthorized())(scope, receive, watched_send)
        except Exception:
            status = 500  # sent by the handler outside of us
            raise
        finally:
            # Only known routes become labels: a scanner must not grow the metrics.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency_s.labels(route).observe(time.perf_counter() - started)

    def _is_allowed(self, scope: Scope) -> bool:
        # Serve leaves its `route_prefix` in the path and names it in `root_path`. A list of what is
        # open rather than of what is closed: a path that reads otherwise than expected asks for a key.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._api_key is None or path in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._api_key)


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "invalid_api_key",
        "missing or wrong API key; send it as `Authorization: Bearer KEY`",
        headers={"WWW-Authenticate": "Bearer"},
    )
