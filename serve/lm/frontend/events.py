"""The server-sent events of a streamed reply.

An event is `data: {json}`, in a session with the stream position after it as `id:`. A comment is
sent in long silences, `[DONE]` at the end. An error after the first byte is an event too, because
the status has been sent.

`fastapi.sse` does not write them: its pings end with an empty line, which OpenAI's client reads as
an event without data, their interval is fixed, and it sends the status before the first event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from models.sink_lm.engine.output import End
from serve.ingress.errors import ApiError, server_error
from serve.ingress.json_text import to_json
from serve.lm.contract import Piece
from serve.lm.frontend.client import Answer
from serve.lm.frontend.reply_bodies import ShownTokens, session_fields, usage
from serve.lm.frontend.service import Job
from serve.lm.settings import LMSettings

MAX_STREAM_BYTES = "max_stream_bytes"
"""`stop_reason` of a stream that grew too long."""

DONE = b"data: [DONE]\n\n"
PING = b": ping\n"
"""A comment. No empty line follows, because that would end an event: clients that remember the last
`id`, such as OpenAI's for Python, would read an event without data and fail."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = logging.getLogger(__name__)


class Events:
    """Makes the events of one streamed reply.

    Only events of a session have an `id`, because nothing else can be resumed.

    Args:
        job: the request.
        answer: its generation, which may not have begun.
        settings: the limits.
    """

    def __init__(self, job: Job, answer: Answer, settings: LMSettings) -> None:
        self._job, self._shape, self._answer = job, job.shape, answer
        self._settings = settings
        self._open = list(range(job.choices))
        self._shown = [ShownTokens() for _ in self._open]
        self._position: int | None = None
        self._made = self._sent = 0

    async def all(self) -> AsyncGenerator[bytes, None]:
        """Yields the events; ends early if the reply gets too long, and at an error."""
        try:
            async with contextlib.aclosing(self._whole_answer()) as events:
                async for data in events:
                    yield data
        except ApiError as error:
            yield failure(error)
        except Exception:
            log.exception("request %s", self._job.start.request_id)
            yield failure(server_error(500, "internal_error", "internal error"))

    async def _whole_answer(self) -> AsyncGenerator[bytes, None]:
        await self._answer.begin()
        self._position = self._answer.started.position
        for index in self._open:
            for chunk in self._shape.first(index):
                yield self._event(chunk | session_entry(self._answer), self._position)
        async with contextlib.aclosing(self._texts()) as texts:
            async for data in texts:
                yield data
                if self._is_full():
                    break
        for index in tuple(self._open):
            yield self._last(index, End(reason="length", stop=MAX_STREAM_BYTES), self._position)
        if self._job.include_usage:
            yield self._event(self._shape.only_usage(self._usage()) | session_entry(self._answer))
        yield DONE

    async def _texts(self) -> AsyncGenerator[bytes, None]:
        """Yields the events with the text of the choices."""
        async with contextlib.aclosing(self._answer.pieces()) as pieces:
            async for batch in pieces:
                for piece in batch:
                    for data in self._piece(piece):
                        yield data

    def _piece(self, piece: Piece) -> Iterator[bytes]:
        """Yields the events of a piece.

        A token that ends within a character has no event yet, and its position is not sent as an
        `id`, so that a client that resumes gets the whole character.
        """
        self._made += piece.made
        text, shown = "".join(token.text for token in piece.tokens), self._shown[piece.index]
        tokens = shown.push(piece.tokens, None) if self._shape.logprobs else []
        if text or tokens:
            seen = next((token.position for token in reversed(piece.tokens) if token.text), None)
            self._position = seen or self._position
            yield self._event(self._shape.chunk(piece.index, text, tokens), seen)
        if piece.end is not None:
            raise_failure(piece.end)
            session = self._answer.session
            yield self._last(piece.index, piece.end, session.stream_position if session else None)

    def _last(self, index: int, end: End, position: int | None) -> bytes:
        """Returns the event that ends a choice, with the tokens that waited for the end."""
        self._open.remove(index)
        tokens = self._shown[index].push((), end)
        return self._event(
            self._shape.last(index, end, tokens) | session_entry(self._answer), position
        )

    def _usage(self) -> dict[str, Any]:
        return usage(self._answer.started, self._made)

    def _event(self, chunk: dict[str, Any], position: int | None = None) -> bytes:
        if self._job.usage_so_far:
            chunk = {"usage": self._usage()} | chunk
        data = event(chunk, position if self._answer.session is not None else None)
        self._sent += len(data)
        return data

    def _is_full(self) -> bool:
        limit = self._settings.max_stream_bytes
        return limit is not None and self._sent > limit


def session_entry(answer: Answer) -> dict[str, Any]:
    """Returns the reply's field about the session; nothing without a session."""
    return {} if answer.session is None else {"session": session_fields(answer.session)}


def raise_failure(end: End | None) -> None:
    """Raises an `ApiError` if an answer ended by cancellation or failure."""
    if end is None or end.reason in ("stop", "length"):
        return
    if end.reason == "cancelled":
        message = "another request went on with the session, or nobody read the answer"
        raise ApiError(409, "cancelled", message, headers={"x-should-retry": "false"})
    raise server_error(500, "generation_failed", end.message or "the generation failed")


def event(value: dict[str, Any], position: int | None = None) -> bytes:
    """Returns the bytes of one event; `position` becomes its `id`."""
    head = b"" if position is None else b"id: %d\n" % position
    return b"%sdata: %s\n\n" % (head, to_json(value))


def failure(error: ApiError) -> bytes:
    """Returns the event of an error."""
    return b"data: %s\n\n" % error.body()


async def with_pings(
    events: AsyncGenerator[bytes, None], ping_s: float
) -> AsyncGenerator[bytes, None]:
    """Yields events, and a comment after every `ping_s` seconds without an event.

    Args:
        events: the events; closed when this generator is closed.
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
    """Returns the next event; empty at the end."""
    return await anext(events, b"")
