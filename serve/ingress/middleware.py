"""Around every request: the API key, the body's limits, the count and the time."""

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
"""What needs no API key: probes, scrapers and the description of the API."""

CLIENT_LEFT = 499
"""Status, in the metrics only, of a request whose client left before its reply began."""


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
    """Lets requests in and counts them.

    Plain ASGI: Starlette's function middleware costs a task per request.

    Args:
        app: what is behind it.
        metrics: of this replica.
        api_key: what clients must present everywhere but on `OPEN_PATHS`; None serves anyone.
        limits: of the requests and their bodies.
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
            await websocket.accept()  # or the client would not learn why
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
            pass  # nobody is left to tell anything; the count says it
        except Exception:
            # Here rather than in Starlette's own handler, which is outside of what adds the headers
            # for browsers. Serve logs the error under the request's id, which the client has; its
            # text may hold anything and stays with us.
            if status == CLIENT_LEFT:
                failure = server_error(500, "internal_error", "internal error")
                await error_response(failure)(scope, receive, watched_send)
            status = 500
            raise
        finally:
            # Only known routes become labels: a scanner must not grow the metrics.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency_s.labels(route).observe(time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_allowed(scope):
            await self._app(scope, receive, send)
        else:
            await error_response(_unauthorized())(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        # Serve leaves its `route_prefix` in the path and names it in `root_path`. A list of what is
        # open rather than of what is closed: a path that reads otherwise than expected asks for a key.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._api_key is None or path in OPEN_PATHS:
            return True
        if scope.get("method") == "OPTIONS":  # load balancers and browsers send no key with it
            return True
        return any(hmac.compare_digest(key, self._api_key) for key in _bearers(scope["headers"]))


def _until_left(receive: Receive, kind: str) -> Receive:
    """Gives what receives a client's messages, and says so when it has left.

    Serve then cancels its own call for the next message, which may be met before the message that
    tells of it.
    """

    async def next_message() -> Message:
        try:
            return await receive()
        except TaskCancelledError:
            return {"type": f"{kind}.disconnect"}

    return next_message


def _bearers(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Keys of the `Authorization: Bearer KEY` headers, whatever white space is around them."""
    found = []
    for name, value in headers:
        scheme, *rest = value.split(maxsplit=1) or [b""]
        if name == b"authorization" and scheme.lower() == b"bearer" and rest:
            found.append(rest[0].strip())
    return found


def _plain(scope: Scope) -> Scope:
    """A request as the routes know it: HEAD as the GET it asks about, no slash at the path's end."""
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
