"""A streamed completion, part by part as the application sends it."""

from __future__ import annotations

import json
from typing import Any

import httpx

from helpers.lm.serving import MODEL

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


async def streamed(
    http: httpx.AsyncClient, body: dict[str, Any], sent: list[tuple[str, bytes]] | None = None
) -> list[tuple[str, bytes]]:
    """Returns the messages of a streamed completion by type and body; `sent` has them meanwhile."""
    app = http._transport.app  # type: ignore[attr-defined]
    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST"},
        **{"path": "/v1/completions", "raw_path": b"", "scheme": "http", "query_string": b""},
        **{"root_path": "", "headers": [(b"content-type", b"application/json")]},
    }
    sent = [] if sent is None else sent

    async def receive() -> Any:
        data = json.dumps(GREEDY | {"stream": True} | body).encode()
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Any) -> None:
        sent.append((message["type"], message.get("body", b"")))

    await app(scope, receive, send)
    return sent
