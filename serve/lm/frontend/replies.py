"""From a checked request to its HTTP reply: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator

from fastapi import Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from serve.ingress.errors import ApiError, server_error
from serve.lm.frontend.client import Answer, LMClient
from serve.lm.frontend.events import HEADERS, Events, raise_failure, session_entry, with_pings
from serve.lm.frontend.reply_bodies import Choice, usage
from serve.lm.frontend.service import Job
from serve.lm.settings import LMSettings

OPEN_AFTER_S = 1.0
"""A stream whose answer has not begun by then is opened; what is refused later is an event of it."""

log = logging.getLogger(__name__)


class Replies:
    """Answers requests; how many at once is the gate's to say.

    Args:
        client: reaches the replicas.
        settings: the limits.
    """

    def __init__(self, client: LMClient, settings: LMSettings) -> None:
        self._client, self._settings = client, settings

    async def reply(self, job: Job) -> Response:
        """Runs a job; what is refused at once is refused before the first byte."""
        with _said_once(job):
            if not job.stream:
                return await self._whole(job)
            answer = self._client.open(job.start)
            try:
                await answer.begin(within_s=OPEN_AFTER_S)
            except BaseException:
                answer.close()
                raise
        return AnswerResponse(answer, self._stream(job, answer))

    async def _whole(self, job: Job) -> Response:
        choices = [Choice(keep_tokens=job.shape.logprobs) for _ in range(job.choices)]
        made = 0
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._client.answer(job.start)
                async with contextlib.aclosing(answer.pieces()) as pieces:
                    async for batch in pieces:
                        for piece in batch:
                            made += piece.made
                            raise_failure(piece.end)
                            choices[piece.index].add(piece.tokens, piece.end)
        except TimeoutError as error:
            message = f"no reply within {self._settings.timeout_s:g} s"
            raise server_error(504, "timeout", message) from error
        counts = usage(answer.started, made)
        return JSONResponse(job.shape.whole(choices, counts) | session_entry(answer))

    async def _stream(self, job: Job, answer: Answer) -> AsyncGenerator[bytes, None]:
        events = Events(job, answer, self._settings).all()
        async with contextlib.aclosing(with_pings(events, self._settings.ping_s)) as pinged:
            async for data in pinged:
                yield data


class AnswerResponse(EventSourceResponse):
    """A stream that cancels its answer however it ends, even before its first event was asked for.

    Args:
        answer: what the replicas make.
        events: of it.
    """

    def __init__(self, answer: Answer, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers=HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


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
