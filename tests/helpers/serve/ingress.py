"""All applications without Ray and without a model, and ASGI requests to them."""

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
from models.media.preprocessing import Preprocessing
from serve.ingress.application import IngressParts
from serve.ingress.settings import ApplicationSettings
from serve.lm.frontend.routes import create_lm_app
from serve.lm.frontend.served_models import ServedModels
from serve.lm.settings import LMSettings
from serve.planning.contract import PlanCard
from serve.planning.frontend.routes import create_planning_app
from serve.planning.frontend.service import PlanningService
from serve.planning.settings import PlanningSettings
from serve.replicas.served_model import ServedModel

POSTS = {
    "embeddings": "/v1/embeddings",
    "language": "/v1/completions",
    "planning": "/v1/plan",
}
NAMES = tuple(POSTS)


@dataclass
class Made:
    app: FastAPI
    registry: CollectorRegistry

    def count(self, route: str, status: int) -> float:
        labels = {"route": route, "status": str(status)}
        return self.registry.get_sample_value("rayjepa_requests_total", labels) or 0.0


def make(name: str, *, api_key: str | None = None, **settings: Any) -> Made:
    """Returns the application of that name. Requests never reach a planner or language model."""
    if name == "embeddings":
        parts = make_parts(api_key=api_key, **settings)
        return Made(parts.app(), parts.metrics.registry)
    if name == "planning":
        return _make_planning(api_key, settings)
    numbers = ("created", "capacity", "sinks", "sessions", "bytes_per_session", "persistent")
    card = SimpleNamespace(name="tiny", fingerprint="f", release="r", **dict.fromkeys(numbers, 1))
    full = LMSettings(model="m", **settings)
    service: Any = SimpleNamespace(card=card, settings=full, check_model=lambda name: None)

    parts = _parts(full, api_key)
    client: Any = SimpleNamespace(describe=lambda: asyncio.sleep(0, card))
    models = ServedModels(full, client, service)
    return Made(create_lm_app(parts, models, client), parts.metrics.registry)


def _parts(settings: ApplicationSettings, api_key: str | None) -> IngressParts:
    async def is_ready() -> bool:
        return True

    async def scrape() -> str:
        return "metrics"

    return IngressParts(settings=settings, scrape=scrape, is_ready=is_ready, api_key=api_key)


def _make_planning(api_key: str | None, settings: dict[str, Any]) -> Made:
    full = PlanningSettings(agent="a", **settings)
    card = PlanCard(
        name="tiny",
        world="tworooms",
        preprocessing=Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        history=1,
        state_width=8,
        action_width=2,
        actions={},
        methods=("cem",),
        judged_by="distance",
        predictors=1,
        reads_places=False,
        task={},
    )
    client: Any = None
    service = PlanningService(full, ServedModel(card), client)
    parts = _parts(full, api_key)
    return Made(create_planning_app(parts, service), parts.metrics.registry)


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
