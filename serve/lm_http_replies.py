"""From a checked request to its HTTP reply: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve import lm_sse
from serve.lm_client import Answer, LMClient
from serve.lm_contract import End, Piece
from serve.lm_replies import Choice, session_fields, usage
from serve.lm_service import Job
from serve.lm_settings import LMSettings
from serve.schemas import ApiError, queue_full, server_error

MAX_STREAM_BYTES = "max_stream_bytes"
"""`stop_reason` of a stream that grew too long."""

log = logging.getLogger(__name__)


class Replies:
    """Answers requests, as many at once as allowed.

    Args:
        client: reaches the replicas.
        settings: the limits.
    """

    def __init__(self, client: LMClient, settings: LMSettings) -> None:
        self._client, self._settings = client, settings
        self._running = 0

    async def reply(self, job: Job) -> Response:
        """Runs a job; what is refused is refused before the first byte."""
        if self._running >= self._settings.max_requests:
            raise queue_full()
        with self._hold(), _said_once(job):
            if not job.stream:
                return await self._whole(job)
            answer = await self._client.answer(job.start)
        return AnswerResponse(answer, self._stream(job, answer))

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _whole(self, job: Job) -> Response:
        choices = [Choice() for _ in range(job.choices)]
        made, keep = 0, job.shape.logprobs
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._client.answer(job.start)
                async with contextlib.aclosing(answer.pieces()) as pieces:
                    async for batch in pieces:
                        for piece in batch:
                            made += len(piece.tokens)
                            _raise_failure(piece.end)
                            choices[piece.index].add(piece.tokens, piece.end, keep_tokens=keep)
        except TimeoutError as error:
            message = f"no reply within {self._settings.timeout_s:g} s"
            raise server_error(504, "timeout", message) from error
        counts = usage(answer.started, made)
        return JSONResponse(job.shape.whole(choices, counts) | _session(answer))

    async def _stream(self, job: Job, answer: Answer) -> AsyncGenerator[bytes, None]:
        with self._hold():
            async with contextlib.aclosing(Events(job, answer, self._settings).all()) as events:
                async for data in events:
                    yield data


class AnswerResponse(StreamingResponse):
    """A stream that cancels its answer however it ends, even before its first event was asked for.

    Args:
        answer: what the replicas make.
        events: of it.
    """

    def __init__(self, answer: Answer, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type=lm_sse.MEDIA_TYPE, headers=lm_sse.HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class Events:
    """The events of one streamed reply.

    Args:
        job: the request.
        answer: what the replicas make of it.
        settings: the limits.
    """

    def __init__(self, job: Job, answer: Answer, settings: LMSettings) -> None:
        self._job, self._shape, self._answer = job, job.shape, answer
        self._settings = settings
        self._open = list(range(job.choices))
        self._position = answer.started.position
        self._made = self._sent = 0

    async def all(self) -> AsyncGenerator[bytes, None]:
        """Yields them; ends early where the reply grows too long."""
        for index in self._open:
            for chunk in self._shape.first(index):
                yield self._event(chunk | _session(self._answer), self._position)
        try:
            async with contextlib.aclosing(self._texts()) as texts:
                async for data in texts:
                    yield data
                    if self._is_full():
                        break
        except ApiError as error:
            yield lm_sse.failure(error)
            return
        for index in self._open:
            yield self._last(index, End(reason="length", stop=MAX_STREAM_BYTES), self._position)
        if self._job.include_usage:
            counts = usage(self._answer.started, self._made)
            yield self._event(self._shape.only_usage(counts) | _session(self._answer))
        yield lm_sse.DONE

    async def _texts(self) -> AsyncGenerator[bytes, None]:
        """What the choices say, and comments in between where they say nothing for long."""
        silent_since = _now()
        async with contextlib.aclosing(self._answer.pieces()) as pieces:
            async for batch in pieces:
                for piece in batch:
                    for data in self._piece(piece):
                        silent_since = _now()
                        yield data
                if _now() - silent_since > self._settings.ping_s:
                    silent_since = _now()
                    yield lm_sse.PING

    def _piece(self, piece: Piece) -> Iterator[bytes]:
        """The events of a piece.

        A token whose text waits for more (half a character) has no event, and its position is not
        sent as an `id`: who resumes there gets it again, whole.
        """
        self._made += len(piece.tokens)
        text = "".join(token.text for token in piece.tokens)
        if text or (self._shape.logprobs and piece.tokens):
            seen = next((token.position for token in reversed(piece.tokens) if token.text), None)
            self._position = seen or self._position
            yield self._event(self._shape.chunk(piece.index, text, piece.tokens), seen)
        if piece.end is not None:
            _raise_failure(piece.end)
            self._open.remove(piece.index)
            session = self._answer.session
            yield self._last(piece.index, piece.end, session.stream_position if session else None)

    def _last(self, index: int, end: End, position: int | None) -> bytes:
        chunk = self._shape.last(index, end) | _session(self._answer)
        return self._event(chunk, position if self._answer.session is not None else None)

    def _event(self, chunk: dict[str, Any], position: int | None = None) -> bytes:
        data = lm_sse.event(chunk, position)
        self._sent += len(data)
        return data

    def _is_full(self) -> bool:
        limit = self._settings.max_stream_bytes
        return limit is not None and self._sent > limit


@contextlib.contextmanager
def _said_once(job: Job) -> Iterator[None]:
    """Keeps clients from sending a session's prompt again after an error: it may be in the stream.

    OpenAI's clients repeat what ends in a 5xx by themselves.
    """
    try:
        yield
    except ApiError as error:
        if job.start.session_id is not None and error.status >= 500 and error.code != "log_failed":
            error.headers = {"x-should-retry": "false"}
        raise
    except Exception as error:
        if job.start.session_id is None:
            raise  # answered and logged by the application's own handler
        log.exception("session %s", job.start.session_id)
        failure = server_error(500, "internal_error", "internal error")
        failure.headers = {"x-should-retry": "false"}
        raise failure from error


def _session(answer: Answer) -> dict[str, Any]:
    return {} if answer.session is None else {"session": session_fields(answer.session)}


def _raise_failure(end: End | None) -> None:
    if end is None or end.reason in ("stop", "length"):
        return
    if end.reason == "cancelled":
        message = "another request went on with the session, or nobody read the answer"
        raise ApiError(409, "cancelled", message, headers={"x-should-retry": "false"})
    raise server_error(500, "generation_failed", end.message or "the generation failed")


def _now() -> float:
    return asyncio.get_running_loop().time()
