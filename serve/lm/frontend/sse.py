"""Server-sent events: the wire form of a streamed reply.

`data: {json}`, `id:` the stream position after the event, a comment in long silences, `[DONE]` at
the end. What fails after the first byte travels as an event too: the status is long sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from serve.ingress.errors import ApiError
from serve.ingress.json_text import to_json

DONE = b"data: [DONE]\n\n"
PING = b": ping\n"
"""A comment is a line. No empty line after it, which would end an event: clients that keep the last
`id`, as OpenAI's for Python does, then make an event without data of it, and fail on that."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MEDIA_TYPE = "text/event-stream"


def event(value: dict[str, Any], position: int | None = None) -> bytes:
    """One event; `position` becomes its `id`."""
    head = b"" if position is None else b"id: %d\n" % position
    return b"%sdata: %s\n\n" % (head, to_json(value))


def failure(error: ApiError) -> bytes:
    """An error after the first byte."""
    return b"data: %s\n\n" % error.body()


async def with_pings(
    events: AsyncGenerator[bytes, None], ping_s: float
) -> AsyncGenerator[bytes, None]:
    """Yields events, and a comment after every `ping_s` without one, whatever they wait for.

    Args:
        events: closed when this is.
        ping_s: seconds of silence.
    """
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            following = asyncio.ensure_future(_next(events))
            while not (await asyncio.wait({following}, timeout=ping_s))[0]:
                yield PING
            data = following.result()
            if not data:
                return
            yield data
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait({following})
        await events.aclose()


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    """The next event; none at the end."""
    return await anext(events, b"")
