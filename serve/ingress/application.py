"""Builds a FastAPI application: its own routes, and around them probes, metrics, errors, limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from serve.ingress.errors import ApiError, ErrorResponse, error_response, server_error
from serve.ingress.json_route import JsonRoute
from serve.ingress.middleware import IngressMiddleware, RequestMetrics
from serve.ingress.request_limits import RequestLimits
from serve.ingress.settings import ApplicationSettings

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = {"GET", "POST", "DELETE"}
# Response headers that scripts in a browser may read.
_SHOWN_TO_BROWSERS = ("x-request-id", "retry-after", "x-should-retry")
# Paths of an OPTIONS request that asks about the server and not about a route.
_WHOLE_SERVER = ("", "/", "*")

Ready = Callable[[], Awaitable[bool | str]]
Scrape = Callable[[], Awaitable[str]]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class IngressParts:
    """What the application of an HTTP replica needs besides its own routes.

    Attributes:
        settings: limits of request bodies, and the web pages that may call the application.
        metrics: counters and times of this replica's requests.
        scrape: returns the Prometheus text of all replicas.
        is_ready: returns whether a model replica is running; a text says more of one that is.
        api_key: the key that clients must send, except for `OPEN_PATHS`; None serves anyone.
    """

    settings: ApplicationSettings
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    scrape: Scrape
    is_ready: Ready
    api_key: str | None = None


def create_app(
    parts: IngressParts,
    add_routes: Callable[[FastAPI], None],
    *,
    summary: str,
    max_requests: int,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """Returns the application of one replica.

    Args:
        parts: what every application needs.
        add_routes: adds the application's own routes.
        summary: one sentence for the description of the API.
        max_requests: requests that may be processed at the same time; see `RequestLimits`.
        lifespan: context that is entered when the replica starts and left when it stops.
    """
    app = FastAPI(
        title="rayjepa",
        summary=summary,
        lifespan=lifespan,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    app.router.route_class = JsonRoute
    add_routes(app)
    add_operation_routes(app, is_ready=parts.is_ready, scrape=parts.scrape)
    add_error_handlers(app)
    _add_middleware(app, parts, RequestLimits(parts.settings, max_requests=max_requests))
    return app


def add_operation_routes(app: FastAPI, *, is_ready: Ready, scrape: Scrape) -> None:
    """Adds `/healthz`, `/health` and `/metrics`.

    Args:
        app: takes the routes.
        is_ready: returns whether a model replica is running.
        scrape: returns the Prometheus text of all replicas.
    """

    @app.get("/healthz", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> PlainTextResponse:
        """Returns 200 if requests can be served, else 503."""
        ready = await is_ready()
        if not ready:
            raise server_error(503, "not_ready", "no model replica is running")
        return PlainTextResponse(ready if isinstance(ready, str) else "ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Returns Prometheus metrics, summed over all replicas."""
        return Response(await scrape(), media_type=PROMETHEUS_TEXT)


def _add_middleware(app: FastAPI, parts: IngressParts, limits: RequestLimits) -> None:
    """Adds our middleware to an application, and around it CORS where web pages may call."""
    app.add_middleware(
        IngressMiddleware, metrics=parts.metrics, api_key=parts.api_key, limits=limits
    )
    origins = parts.settings.cors_origins
    if origins:  # outside of ours: a preflight has no key, and errors need the headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=sorted(_METHODS | {"HEAD"}),
            allow_headers=["*"],
            expose_headers=_SHOWN_TO_BROWSERS,
        )


def add_error_handlers(app: FastAPI) -> None:
    """Makes an application answer errors in OpenAI's form, and OPTIONS with the methods."""

    @app.exception_handler(ApiError)
    async def typed(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        methods = _methods(request)
        if methods:
            headers["Allow"] = ", ".join(methods)
        if request.method == "OPTIONS" and methods:
            return Response(status_code=204, headers=headers)
        code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        message = f"{error.detail}: {request.method} {request.url.path}"
        return error_response(ApiError(error.status_code, code, message, headers=headers))


def _methods(request: Request) -> list[str]:
    """Returns the methods of a path over all its routes; for `/` and `*` those of the server."""
    scope = request.scope
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            found |= route.methods or set()
    is_server = scope["path"].removeprefix(scope.get("root_path", "")) in _WHOLE_SERVER
    if request.method == "OPTIONS" and is_server:
        found |= _METHODS
    if "GET" in found:
        found |= {"HEAD"}
    return sorted(found | {"OPTIONS"}) if found else []
