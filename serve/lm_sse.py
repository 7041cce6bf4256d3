"""Server-sent events: the wire form of a streamed reply.

`data: {json}`, `id:` the stream position after the event, a comment in long silences, `[DONE]` at
the end. What fails after the first byte travels as an event too: the status is long sent.
"""

from __future__ import annotations

from typing import Any

import pydantic_core

from serve.schemas import ApiError

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MEDIA_TYPE = "text/event-stream"


def event(value: dict[str, Any], position: int | None = None) -> bytes:
    """One event; `position` becomes its `id`."""
    head = b"" if position is None else b"id: %d\n" % position
    return b"%sdata: %s\n\n" % (head, pydantic_core.to_json(value))


def failure(error: ApiError) -> bytes:
    """An error after the first byte."""
    return b"data: %s\n\n" % error.body()
