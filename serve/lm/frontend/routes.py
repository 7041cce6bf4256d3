"""The language model's routes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from serve.ingress.application import (
    add_gate,
    add_operation_routes,
    check_content_type,
    read_body,
)
from serve.ingress.bodies import Body, describe_body, parse_body
from serve.ingress.errors import ApiError, ErrorResponse
from serve.ingress.gate import RequestMetrics
from serve.ingress.intake import Intake
from serve.lm.contract import SessionState, is_session_id
from serve.lm.frontend.client import LMClient
from serve.lm.frontend.replies import Replies
from serve.lm.frontend.schemas import (
    ChatRequest,
    CompletionRequest,
    CreateSession,
    DetokenizeRequest,
    ForkSession,
    TokenizeRequest,
)
from serve.lm.frontend.service import LanguageService
from serve.lm.settings import LMSettings


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
    _add_generation_routes(app, parts)
    _add_session_routes(app, parts)
    _add_token_routes(app, parts)
    _add_model_routes(app, parts)
    add_operation_routes(app, is_ready=parts.is_ready, scrape=parts.scrape)
    settings = parts.settings
    add_gate(
        app,
        metrics=parts.metrics,
        api_key=parts.api_key,
        intake=Intake(settings, max_requests=settings.max_requests),
        cors_origins=settings.cors_origins,
    )
    return app


def _add_generation_routes(app: FastAPI, parts: LMParts) -> None:
    service, replies = parts.service, Replies(parts.client, parts.settings)

    @app.post(
        "/v1/completions", response_model=None, openapi_extra=describe_body(CompletionRequest)
    )
    async def create_completion(request: Request) -> Response:
        """Continues a text."""
        body = await _parse(request, parts, CompletionRequest)
        plan = partial(service.completion, body, _session_header(request))
        return await replies.reply(await asyncio.to_thread(plan))

    @app.post("/v1/chat/completions", response_model=None, openapi_extra=describe_body(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answers in a chat."""
        body = await _parse(request, parts, ChatRequest)
        plan = partial(service.chat, body, _session_header(request))
        return await replies.reply(await asyncio.to_thread(plan))


def _add_session_routes(app: FastAPI, parts: LMParts) -> None:
    service, client = parts.service, parts.client

    @app.post("/v1/sessions", status_code=201, openapi_extra=describe_body(CreateSession))
    async def create_session(request: Request) -> Any:
        """Makes a session."""
        body = await _parse(request, parts, CreateSession)
        service.check_model(body.model)
        session_id = body.session_id or f"session-{uuid.uuid4().hex}"
        limit = service.card.capacity - 2
        if body.sink_tokens is not None and body.sink_tokens > limit:
            message = f"sink_tokens: {body.sink_tokens} is more than {limit}"
            raise ApiError(400, "invalid_value", message, param="sink_tokens")
        pinned = await asyncio.to_thread(service.pinned, body)
        sinks = len(pinned) if pinned else body.sink_tokens
        made_by = uuid.uuid4().hex
        return _described(
            await client.call(session_id, "create", session_id, sinks, pinned, body.ttl_s, made_by)
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
        await client.delete(_checked(session_id))
        return {"id": session_id, "object": "session.deleted", "deleted": True}

    @app.post(
        "/v1/sessions/{session_id}/fork",
        status_code=201,
        openapi_extra=describe_body(ForkSession, required=False),
    )
    async def fork_session(session_id: str, request: Request) -> Any:
        """Makes a second session with the same stream so far."""
        body = await _parse_optional(request, parts, ForkSession)
        new_id = body.session_id or f"session-{uuid.uuid4().hex}"
        made_by = uuid.uuid4().hex
        return _described(
            await client.call(_checked(session_id), "fork", session_id, new_id, made_by)
        )

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

    @app.post("/v1/tokenize", openapi_extra=describe_body(TokenizeRequest))
    async def tokenize(request: Request) -> Any:
        """Token ids of a text or of messages."""
        body = await _parse(request, parts, TokenizeRequest)
        service.check_model(body.model)
        ids = await asyncio.to_thread(service.tokenize, body)
        reply: dict[str, Any] = {"count": len(ids), "max_model_len": None, "tokens": list(ids)}
        if body.return_token_strs:
            token_bytes = service.tokenizer.token_bytes
            reply["token_strs"] = [token_bytes(t).decode(errors="replace") for t in ids]
        return reply

    @app.post("/v1/detokenize", openapi_extra=describe_body(DetokenizeRequest))
    async def detokenize(request: Request) -> Any:
        """The text of token ids."""
        body = await _parse(request, parts, DetokenizeRequest)
        service.check_model(body.model)
        service.check_tokens(body.tokens, "tokens")
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}


def _add_model_routes(app: FastAPI, parts: LMParts) -> None:
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


async def _parse(request: Request, parts: LMParts, kind: type[Body]) -> Body:
    check_content_type(request)
    body = await read_body(request, parts.settings.max_request_bytes)
    return parse_body(body, kind)


async def _parse_optional(request: Request, parts: LMParts, kind: type[Body]) -> Body:
    """A body that may be left out."""
    body = await read_body(request, parts.settings.max_request_bytes)
    if not body:
        return kind()
    check_content_type(request)
    return parse_body(body, kind)


def _session_header(request: Request) -> str | None:
    return request.headers.get("x-session-id")


def _checked(session_id: str) -> str:
    if not is_session_id(session_id):
        message = f"the session {session_id[:40]!r} does not exist"
        raise ApiError(404, "session_not_found", message, param="session_id")
    return session_id


def _described(state: SessionState) -> dict[str, Any]:
    return {"object": "session", **asdict(state)}
