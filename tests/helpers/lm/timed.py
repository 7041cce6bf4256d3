"""A streamed completion with the time at which the application sent each part."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from helpers.lm.serving import MODEL

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


async def timed(http: httpx.AsyncClient, body: dict[str, Any]) -> list[tuple[float, str, bytes]]:
    """What the application sends to a streamed completion, and when."""
    app = http._transport.app  # type: ignore[attr-defined]
    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST"},
        **{"path": "/v1/completions", "raw_path": b"", "scheme": "http", "query_string": b""},
        **{"root_path": "", "headers": [(b"content-type", b"application/json")]},
    }
    sent: list[tuple[float, str, bytes]] = []
    begun = time.monotonic()

    async def receive() -> Any:
        data = json.dumps(GREEDY | {"stream": True} | body).encode()
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        data = message.get("body", b"")
        sent.append((time.monotonic() - begun, message["type"], data))

    await app(scope, receive, send)
    return sent
