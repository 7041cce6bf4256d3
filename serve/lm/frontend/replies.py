"""Turns a checked request into its HTTP reply, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator

from fastapi import Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from serve.ingress.errors import ApiError, server_error
from serve.lm.frontend.client import Answer, LMClient
from serve.lm.frontend.events import HEADERS, Events, raise_failure, session_entry, with_pings
from serve.lm.frontend.reply_bodies import Choice, usage
from serve.lm.frontend.served_models import ServedModels
from serve.lm.frontend.service import Job, LanguageService
from serve.lm.settings import LMSettings

OPEN_AFTER_S = 1.0
"""Seconds after which a stream is opened although its answer has not begun; a later refusal is sent
as an event."""

log = logging.getLogger(__name__)


class Replies:
    """Answers requests; `RequestLimits` says how many at the same time.

    Args:
        client: calls the model's replicas.
        models: prepare requests.
        settings: the limits.
    """

    def __init__(self, client: LMClient, models: ServedModels, settings: LMSettings) -> None:
        self._client, self._models, self._settings = client, models, settings

    async def reply(self, name: str | None, plan: Callable[[LanguageService], Job]) -> Response:
        """Answers a request; if it is refused at once, that is raised before the first byte.

        Args:
            name: the model that the request names.
            plan: checks and tokenizes the request for a model.
        """

        async def attempt(service: LanguageService, key: str) -> Response:
            return await self._run(await asyncio.to_thread(plan, service), key)

        return await self._models.run(name, attempt)

    async def _run(self, job: Job, key: str) -> Response:
        with _said_once(job):
            if not job.stream:
                return await self._whole(job, key)
            answer = self._client.open(job.start, key)
            try:
                await answer.begin(within_s=OPEN_AFTER_S)
            except BaseException:
                answer.close()
                raise
        return AnswerResponse(answer, self._stream(job, answer))

    async def _whole(self, job: Job, key: str) -> Response:
        choices = [Choice(keep_tokens=job.shape.logprobs) for _ in range(job.choices)]
        made = 0
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._client.answer(job.start, key)
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
    """A streamed reply that cancels its answer when it ends, even before the first event.

    Args:
        answer: the generation.
        events: the events to send.
    """

    def __init__(self, answer: Answer, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers=HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the reply."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


@contextlib.contextmanager
def _said_once(job: Job) -> Iterator[None]:
    """Tells clients of a session not to repeat a request after an error.

    OpenAI's clients repeat requests that end in a 5xx, but the prompt may be in the stream already.
    """
    try:
        yield
    except ApiError as error:
        unfed = error.code in ("log_failed", "model_changed")
        if job.start.session_id is not None and error.status >= 500 and not unfed:
            error.headers = {"x-should-retry": "false"}
        raise
    except Exception as error:
        if job.start.session_id is None:
            raise  # answered and logged by the application's own handler
        log.exception("session %s", job.start.session_id)
        failure = server_error(500, "internal_error", "internal error")
        failure.headers = {"x-should-retry": "false"}
        raise failure from error
