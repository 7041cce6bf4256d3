"""Both applications without Ray and without a model, and ASGI requests to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray.exceptions import TaskCancelledError

from helpers.serve.fake_model import make_parts
from serve.ingress.application import IngressParts
from serve.lm.frontend.routes import create_lm_app
from serve.lm.frontend.served_models import ServedModels
from serve.lm.settings import LMSettings

POSTS = {"embeddings": "/v1/embeddings", "language": "/v1/completions"}
NAMES = tuple(POSTS)


@dataclass
class Made:
    app: FastAPI
    registry: CollectorRegistry

    def count(self, route: str, status: int) -> float:
        labels = {"route": route, "status": str(status)}
        return self.registry.get_sample_value("rayjepa_requests_total", labels) or 0.0


def make(name: str, *, api_key: str | None = None, **settings: Any) -> Made:
    """Returns the application of that name. Requests never reach the language model itself."""
    if name == "embeddings":
        parts = make_parts(api_key=api_key, **settings)
        return Made(parts.app(), parts.metrics.registry)
    numbers = ("created", "capacity", "sinks", "sessions", "bytes_per_session", "persistent")
    card = SimpleNamespace(name="tiny", fingerprint="f", release="r", **dict.fromkeys(numbers, 1))
    full = LMSettings(model="m", **settings)
    service: Any = SimpleNamespace(card=card, settings=full, check_model=lambda name: None)

    async def is_ready() -> bool:
        return True

    async def scrape() -> str:
        return "metrics"

    parts = IngressParts(settings=full, scrape=scrape, is_ready=is_ready, api_key=api_key)
    client: Any = SimpleNamespace(describe=lambda: asyncio.sleep(0, card))
    models = ServedModels(full, client, service)
    return Made(create_lm_app(parts, models, client), parts.metrics.registry)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


async def ask(
    app: FastAPI,
    method: str,
    path: str,
    *,
    headers: dict[str, str] | None = None,
    pieces: Iterable[bytes] = (b"",),
    then: str = "end",
    into: list[Reply] | None = None,
) -> Reply:
    """Sends one request and returns its reply.

    After its pieces the body ends, never ends (`stall`), or the client leaves (`leave`), which
    Serve may report by an error of its own (`cancel`). What came before an exception is in `into`.
    """
    given = {"content-type": "application/json"} | (headers or {})
    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "scheme": "http"},
        **{"method": method, "path": path, "raw_path": path.encode(), "query_string": b""},
        **{"root_path": "", "server": ("test", 80), "http_version": "1.1"},
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
    }
    waiting = list(pieces)
    reply = Reply(0, {}, b"")
    if into is not None:
        into.append(reply)

    async def receive() -> Any:
        if waiting:
            piece = waiting.pop(0)
            more = bool(waiting) or then != "end"
            return {"type": "http.request", "body": piece, "more_body": more}
        if then == "stall":
            await asyncio.Event().wait()
        if then == "cancel":
            raise TaskCancelledError
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")

    await app(scope, receive, send)
    return reply
