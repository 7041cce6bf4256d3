"""The language model's routes."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from serve import lm_sse
from serve.http_api import (
    PROMETHEUS_TEXT,
    Gate,
    RequestMetrics,
    add_error_handlers,
    check_content_type,
    read_body,
)
from serve.lm_client import Answer, LMClient
from serve.lm_contract import End, Piece, SessionState, is_session_id
from serve.lm_replies import Choice, session_fields, usage
from serve.lm_schemas import (
    ChatRequest,
    CompletionRequest,
    CreateSession,
    DetokenizeRequest,
    ForkSession,
    TokenizeRequest,
)
from serve.lm_service import Job, LanguageService
from serve.lm_settings import LMSettings
from serve.schemas import ApiError, Body, ErrorResponse, parse_body, queue_full, server_error


@dataclass(frozen=True, kw_only=True)
class LMParts:
    """What the application is made of.

    Attributes:
        settings: the limits.
        service: checks requests.
        client: reaches the replicas.
        metrics: this replica's request metrics.
        scrape: returns the Prometheus text of all replicas.
        is_ready: whether a model replica is up.
        api_key: what clients must present on `/v1/`; None serves anyone.
    """

    settings: LMSettings
    service: LanguageService
    client: LMClient
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    scrape: Callable[[], Awaitable[str]]
    is_ready: Callable[[], Awaitable[bool]]
    api_key: str | None = None


def create_lm_app(parts: LMParts) -> FastAPI:
    """Builds the application around its parts; everything in it is per replica."""
    app = FastAPI(
        title="rayjepa",
        summary="An endless language model in the OpenAI shape.",
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    add_error_handlers(app)
    _add_generation_routes(app, parts)
    _add_session_routes(app, parts)
    _add_token_routes(app, parts)
    _add_operation_routes(app, parts)
    app.add_middleware(Gate, metrics=parts.metrics, api_key=parts.api_key)
    return app


def _add_generation_routes(app: FastAPI, parts: LMParts) -> None:
    service, replies = parts.service, Replies(parts)

    @app.post("/v1/completions", response_model=None, openapi_extra=_takes(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Continues a text."""
        body = await _parse(request, parts, CompletionRequest)
        return await replies.reply(service.completion(body, _session_header(request)))

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=_takes(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answers in a chat."""
        body = await _parse(request, parts, ChatRequest)
        return await replies.reply(service.chat(body, _session_header(request)))


class Replies:
    """Turns jobs into HTTP replies, as many at once as allowed.

    Args:
        parts: see `LMParts`.
    """

    def __init__(self, parts: LMParts) -> None:
        self._client, self._settings = parts.client, parts.settings
        self._running = 0

    async def reply(self, job: Job) -> Response:
        """Runs a job; what is refused is refused before the first byte."""
        if self._running >= self._settings.max_requests:
            raise queue_full()
        if not job.stream:
            with self._hold():
                return await self._whole(job)
        with self._hold():
            answer = await self._client.answer(job.start)
        return StreamingResponse(
            self._stream(job, answer), media_type=lm_sse.MEDIA_TYPE, headers=lm_sse.HEADERS
        )

    @contextlib.contextmanager
    def _hold(self) -> Any:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _whole(self, job: Job) -> Response:
        choices = [Choice() for _ in range(max(1, len(job.start.feeds) * job.start.n))]
        made = 0
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._client.answer(job.start)
                async with contextlib.aclosing(answer.pieces()) as pieces:
                    async for batch in pieces:
                        for piece in batch:
                            made += len(piece.tokens)
                            _raise_failure(piece.end)
                            keep = job.shape.logprobs
                            choices[piece.index].add(piece.tokens, piece.end, keep_tokens=keep)
        except TimeoutError as error:
            message = f"no reply within {self._settings.timeout_s:g} s"
            raise server_error(504, "timeout", message) from error
        counts = usage(answer.started, made)
        return JSONResponse(job.shape.whole(choices, counts) | _session(answer.session))

    async def _stream(self, job: Job, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The events of a streamed reply; ends early where the reply grows too long."""
        sent, limit = 0, self._settings.max_stream_bytes
        with self._hold():
            async with contextlib.aclosing(self._events(job, answer)) as events:
                async for data in events:
                    yield data
                    sent += len(data)
                    if limit is not None and sent > limit:
                        end = End(reason="length", stop="max_stream_bytes")
                        last = job.shape.last(0, end) | _session(answer.session)
                        yield lm_sse.event(last)
                        yield lm_sse.DONE
                        return

    async def _events(self, job: Job, answer: Answer) -> AsyncGenerator[bytes, None]:
        shape, started, made = job.shape, answer.started, 0
        for index in range(max(1, len(job.start.feeds) * job.start.n)):
            for chunk in shape.first(index):
                yield lm_sse.event(chunk | _session(started.session), started.position)
        silent_since = _now()
        try:
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for batch in pieces:
                    for piece in batch:
                        made += len(piece.tokens)
                        for data in self._piece(job, answer, piece):
                            silent_since = _now()
                            yield data
                    if _now() - silent_since > self._settings.ping_s:
                        silent_since = _now()
                        yield lm_sse.PING
        except ApiError as error:
            yield lm_sse.failure(error)
            return
        if job.include_usage:
            counts = usage(started, made)
            yield lm_sse.event(shape.only_usage(counts) | _session(answer.session))
        yield lm_sse.DONE

    def _piece(self, job: Job, answer: Answer, piece: Piece) -> list[bytes]:
        """The events of a piece.

        A token whose text waits for more (half a character) has no event, and its position is not
        sent as an `id`: who resumes there gets it again, whole.
        """
        events, text = [], "".join(token.text for token in piece.tokens)
        if text or (job.shape.logprobs and piece.tokens):
            chunk = job.shape.chunk(piece.index, text, piece.tokens)
            events.append(lm_sse.event(chunk, _whole_until(piece)))
        if piece.end is not None:
            _raise_failure(piece.end)
            chunk = job.shape.last(piece.index, piece.end) | _session(answer.session)
            position = answer.session.stream_position if answer.session else None
            events.append(lm_sse.event(chunk, position))
        return events


def _whole_until(piece: Piece) -> int | None:
    """Position after the last token of a piece that has text."""
    return next((token.position for token in reversed(piece.tokens) if token.text), None)


def _add_session_routes(app: FastAPI, parts: LMParts) -> None:
    service, client = parts.service, parts.client

    @app.post("/v1/sessions", status_code=201, openapi_extra=_takes(CreateSession))
    async def create_session(request: Request) -> Any:
        """Makes a session."""
        body = await _parse(request, parts, CreateSession)
        service.check_model(body.model)
        session_id = body.session_id or f"session-{uuid.uuid4().hex}"
        limit = service.card.capacity - 2
        if body.sink_tokens is not None and body.sink_tokens > limit:
            message = f"sink_tokens: {body.sink_tokens} is more than {limit}"
            raise ApiError(400, "invalid_value", message, param="sink_tokens")
        pinned = service.pinned(body)
        sinks = len(pinned) if pinned else body.sink_tokens
        return _described(
            await client.call(session_id, "create", session_id, sinks, pinned, body.ttl_s)
        )

    @app.get("/v1/sessions")
    async def list_sessions() -> Any:
        """Lists the sessions that are stored; without a store, those of one replica."""
        states = await client.call("list", "list_sessions")
        return {"object": "list", "data": [_described(state) for state in states]}

    @app.get("/v1/sessions/{session_id}")
    async def get_session(session_id: str) -> Any:
        """Describes a session."""
        return _described(await client.call(_checked(session_id), "describe_session", session_id))

    @app.delete("/v1/sessions/{session_id}")
    async def delete_session(session_id: str) -> Any:
        """Ends what it generates and removes it."""
        await client.call(_checked(session_id), "delete", session_id)
        return {"id": session_id, "object": "session.deleted", "deleted": True}

    @app.post("/v1/sessions/{session_id}/fork", status_code=201, openapi_extra=_takes(ForkSession))
    async def fork_session(session_id: str, request: Request) -> Any:
        """Makes a second session with the same stream so far."""
        body = await _parse_optional(request, parts, ForkSession)
        new_id = body.session_id or f"session-{uuid.uuid4().hex}"
        return _described(await client.call(_checked(session_id), "fork", session_id, new_id))

    @app.post("/v1/sessions/{session_id}/snapshot")
    async def snapshot_session(session_id: str) -> Any:
        """Stores its keys and values now."""
        return _described(await client.call(_checked(session_id), "snapshot", session_id))

    @app.post("/v1/sessions/{session_id}/restore")
    async def restore_session(session_id: str) -> Any:
        """Drops its keys and values and loads them from the store again."""
        return _described(await client.call(_checked(session_id), "restore", session_id))


def _add_token_routes(app: FastAPI, parts: LMParts) -> None:
    service = parts.service

    @app.post("/v1/tokenize", openapi_extra=_takes(TokenizeRequest))
    async def tokenize(request: Request) -> Any:
        """Token ids of a text or of messages."""
        body = await _parse(request, parts, TokenizeRequest)
        service.check_model(body.model)
        ids = service.tokenize(
            body.prompt,
            body.messages,
            add_special_tokens=body.add_special_tokens,
            add_generation_prompt=body.add_generation_prompt,
        )
        reply = {"count": len(ids), "max_model_len": None, "tokens": list(ids)}
        if body.return_token_strs:
            token_bytes = service.tokenizer.token_bytes
            reply["token_strs"] = [token_bytes(t).decode(errors="replace") for t in ids]
        return reply

    @app.post("/v1/detokenize", openapi_extra=_takes(DetokenizeRequest))
    async def detokenize(request: Request) -> Any:
        """The text of token ids."""
        body = await _parse(request, parts, DetokenizeRequest)
        service.check_model(body.model)
        service.check_tokens(body.tokens, "tokens")
        return {"prompt": service.tokenizer.decode(body.tokens)}


def _add_operation_routes(app: FastAPI, parts: LMParts) -> None:
    service = parts.service

    def model() -> dict[str, Any]:
        card = service.card
        numbers = {
            name: getattr(card, name)
            for name in ("capacity", "sinks", "sessions", "bytes_per_session", "persistent")
        }
        return {
            "id": card.name,
            "object": "model",
            "created": card.created,
            "owned_by": "rayjepa",
            "modality": "text",
            "max_model_len": None,  # there is no limit to a stream
            "fingerprint": card.fingerprint,
            **numbers,
        }

    @app.get("/v1/models")
    async def list_models() -> Any:
        """Lists what this server has."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Any:
        """Describes one model."""
        service.check_model(name)
        return model()

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> PlainTextResponse:
        """200 when requests can be served, else 503."""
        if not await parts.is_ready():
            raise server_error(503, "not_ready", "no model replica is running")
        return PlainTextResponse("ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text, summed over all replicas."""
        return Response(await parts.scrape(), media_type=PROMETHEUS_TEXT)


async def _parse(request: Request, parts: LMParts, kind: type[Body]) -> Body:
    check_content_type(request)
    body = await read_body(request, parts.settings.max_request_bytes)
    return parse_body(body, kind)


async def _parse_optional(request: Request, parts: LMParts, kind: type[Body]) -> Body:
    """A body that may be left out."""
    if request.headers.get("content-length", "0") == "0":
        return kind()
    return await _parse(request, parts, kind)


def _session_header(request: Request) -> str | None:
    return request.headers.get("x-session-id")


def _checked(session_id: str) -> str:
    if not is_session_id(session_id):
        message = f"the session {session_id[:40]!r} does not exist"
        raise ApiError(404, "session_not_found", message, param="session_id")
    return session_id


def _described(state: SessionState) -> dict[str, Any]:
    return {"object": "session", **asdict(state)}


def _session(state: SessionState | None) -> dict[str, Any]:
    return {} if state is None else {"session": session_fields(state)}


def _raise_failure(end: End | None) -> None:
    if end is None or end.reason in ("stop", "length"):
        return
    if end.reason == "cancelled":
        message = "another request went on with the session, or nobody read the answer"
        raise ApiError(409, "cancelled", message, headers={"x-should-retry": "false"})
    raise server_error(500, "generation_failed", end.message or "the generation failed")


def _takes(kind: type[Any]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def _now() -> float:
    return asyncio.get_running_loop().time()
