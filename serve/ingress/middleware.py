"""The middleware of every application: API key, request limits, request metrics."""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable

from fastapi import WebSocket
from prometheus_client import CollectorRegistry, Counter, Histogram
from ray.exceptions import TaskCancelledError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.ingress.errors import ApiError, error_response, server_error
from serve.ingress.request_limits import RequestLimits
from serve.ingress.websockets import refuse
from serve.telemetry import LATENCY_BUCKETS_S

OPEN_PATHS = frozenset({"/healthz", "/health", "/metrics", "/docs", "/redoc", "/openapi.json"})
"""Paths that need no API key: for probes, for scrapers, and the description of the API."""

CLIENT_LEFT = 499
"""Status in the metrics for a request whose client left before the reply began."""


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


class IngressMiddleware:
    """Checks the API key, applies the request limits, and counts and times requests.

    It is plain ASGI, because Starlette's function middleware starts a task for every request.

    Args:
        app: the application behind it.
        metrics: counters and times of this replica's requests.
        api_key: the key that clients must send, except for `OPEN_PATHS`; None serves anyone.
        limits: limits of requests and their bodies.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: RequestMetrics, api_key: str | None, limits: RequestLimits
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._api_key = api_key.encode() if api_key is not None else None
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] in ("http", "websocket"):
            receive = _until_left(receive, scope["type"])
        if scope["type"] == "http":
            await self._count(_plain(scope), receive, send, is_head=scope["method"] == "HEAD")
        elif scope["type"] == "websocket" and not self._is_allowed(scope):
            websocket = WebSocket(scope, receive, send)
            await websocket.accept()  # only then can the client be told why
            await refuse(websocket, _unauthorized())
        elif scope["type"] == "websocket":
            await self._app(_plain(scope), receive, send)
        else:
            await self._app(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send, *, is_head: bool) -> None:
        started, status = time.perf_counter(), CLIENT_LEFT

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            with self._limits.watch(scope, receive) as watched_receive:
                await self._answer(scope, watched_receive, watched_send)
        except ClientDisconnect:
            pass  # the client has left; only the metrics tell of it
        except Exception:
            # Answered here because Starlette's own handler is outside of the middleware that adds
            # the headers for browsers. The error's text may hold secrets, so the client only gets
            # the request's id, under which Serve logs the error.
            if status == CLIENT_LEFT:
                failure = server_error(500, "internal_error", "internal error")
                await error_response(failure)(scope, receive, watched_send)
            status = 500
            raise
        finally:
            # Unknown paths share one label, so that a scanner cannot add metrics without end.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency_s.labels(route).observe(time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_allowed(scope):
            await self._app(scope, receive, send)
        else:
            await error_response(_unauthorized())(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        # Serve leaves its `route_prefix` in the path and names it in `root_path`. We list the open
        # paths and not the closed ones, so that a path in unexpected form needs a key.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._api_key is None or path in OPEN_PATHS:
            return True
        if scope.get("method") == "OPTIONS":  # load balancers and browsers send no key with it
            return True
        return any(hmac.compare_digest(key, self._api_key) for key in _bearers(scope["headers"]))


def _until_left(receive: Receive, kind: str) -> Receive:
    """Returns a `receive` that reports a client who has left by ASGI's message for that.

    When a client leaves, Serve cancels its own call for the next message, which may happen before
    ASGI's message arrives.
    """

    async def next_message() -> Message:
        try:
            return await receive()
        except TaskCancelledError:
            return {"type": f"{kind}.disconnect"}

    return next_message


def _bearers(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Returns the keys of all `Authorization: Bearer KEY` headers, without white space."""
    found = []
    for name, value in headers:
        scheme, *rest = value.split(maxsplit=1) or [b""]
        if name == b"authorization" and scheme.lower() == b"bearer" and rest:
            found.append(rest[0].strip())
    return found


def _plain(scope: Scope) -> Scope:
    """Returns the scope that the routes expect: GET for HEAD, no slash at the end of the path."""
    plain = {**scope, "path": scope["path"].rstrip("/") or "/"}
    if scope.get("method") == "HEAD":
        plain["method"] = "GET"
    return plain


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "invalid_api_key",
        "missing or wrong API key; send it as `Authorization: Bearer KEY`",
        headers={"WWW-Authenticate": "Bearer"},
    )
