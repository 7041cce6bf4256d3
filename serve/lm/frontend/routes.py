"""The language model's routes."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import Body, FastAPI, Header, Response

from serve.ingress.application import IngressParts, create_app
from serve.ingress.errors import ApiError
from serve.lm.contract import SessionState, is_session_id
from serve.lm.frontend.client import LMClient
from serve.lm.frontend.replies import Replies
from serve.lm.frontend.schemas import (
    ChatRequest,
    CompletionRequest,
    CreateSession,
    DetokenizeRequest,
    ForkSession,
    Model,
    TokenizeRequest,
)
from serve.lm.frontend.served_models import ServedModels
from serve.lm.frontend.service import LanguageService
from serve.replicas.model_routes import add_model_routes

SessionHeader = Annotated[str | None, Header()]
"""The header `X-Session-ID`, for clients that cannot add `session_id` to the body."""


def create_lm_app(parts: IngressParts, models: ServedModels, client: LMClient) -> FastAPI:
    """Returns the application of one replica.

    Args:
        parts: what every application needs.
        models: check requests.
        client: calls the model's replicas.
    """

    def add_routes(app: FastAPI) -> None:
        _add_generation_routes(app, models, client)
        _add_session_routes(app, models, client)
        _add_token_routes(app, models)
        add_model_routes(app, Model, partial(_model, models))

    return create_app(
        parts,
        add_routes,
        summary="An endless language model in the OpenAI shape.",
        max_requests=models.settings.max_requests,
    )


def _add_generation_routes(app: FastAPI, models: ServedModels, client: LMClient) -> None:
    replies = Replies(client, models, models.settings)

    @app.post("/v1/completions", response_model=None)
    async def create_completion(
        body: CompletionRequest, x_session_id: SessionHeader = None
    ) -> Response:
        """Continues a text."""
        return await replies.reply(
            body.model, lambda service: service.completion(body, x_session_id)
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(
        body: ChatRequest, x_session_id: SessionHeader = None
    ) -> Response:
        """Answers the messages of a chat."""
        return await replies.reply(body.model, lambda service: service.chat(body, x_session_id))


def _add_session_routes(app: FastAPI, models: ServedModels, client: LMClient) -> None:
    @app.post("/v1/sessions", status_code=201)
    async def create_session(body: CreateSession) -> Any:
        """Creates a session."""
        session_id = body.session_id or f"session-{uuid.uuid4().hex}"
        made_by = uuid.uuid4().hex

        async def attempt(service: LanguageService, _: str) -> SessionState:
            pinned, sinks = await asyncio.to_thread(_first_tokens, service, body)
            asked = (session_id, sinks, pinned, body.ttl_s, made_by, service.card.release)
            state: SessionState = await client.call(session_id, "create", *asked)
            return state

        return _described(await models.run(body.model, attempt))

    @app.get("/v1/sessions")
    async def list_sessions() -> Any:
        """Lists the stored sessions; without a store, the sessions of one replica."""
        states = await client.call("list", "list_sessions")
        return {"object": "list", "data": [_described(state) for state in states]}

    @app.get("/v1/sessions/{session_id}")
    async def get_session(session_id: str) -> Any:
        """Describes a session."""
        return _described(await client.call(_checked(session_id), "describe_session", session_id))

    @app.delete("/v1/sessions/{session_id}")
    async def delete_session(session_id: str) -> Any:
        """Deletes a session, and ends what it generates."""
        await client.delete(_checked(session_id))
        return {"id": session_id, "object": "session.deleted", "deleted": True}

    @app.post("/v1/sessions/{session_id}/fork", status_code=201)
    async def fork_session(
        session_id: str, body: Annotated[ForkSession, Body(default_factory=ForkSession)]
    ) -> Any:
        """Creates a second session with the same stream so far."""
        new_id = body.session_id or f"session-{uuid.uuid4().hex}"
        made_by = uuid.uuid4().hex
        return _described(
            await client.call(_checked(session_id), "fork", session_id, new_id, made_by)
        )

    @app.post("/v1/sessions/{session_id}/snapshot")
    async def snapshot_session(session_id: str) -> Any:
        """Stores a session's keys and values now."""
        return _described(await client.call(_checked(session_id), "snapshot", session_id))

    @app.post("/v1/sessions/{session_id}/restore")
    async def restore_session(session_id: str) -> Any:
        """Drops a session's keys and values and loads them from the store again."""
        return _described(await client.call(_checked(session_id), "restore", session_id))


def _first_tokens(
    service: LanguageService, body: CreateSession
) -> tuple[tuple[int, ...], int | None]:
    """Returns the pinned tokens of a new session, and how many sinks it has."""
    service.check_model(body.model)
    limit = service.card.capacity - 2
    if body.sink_tokens is not None and body.sink_tokens > limit:
        message = f"sink_tokens: {body.sink_tokens} is more than {limit}"
        raise ApiError(400, "invalid_value", message, param="sink_tokens")
    pinned = service.pinned(body)
    return pinned, len(pinned) if pinned else body.sink_tokens


def _add_token_routes(app: FastAPI, models: ServedModels) -> None:
    @app.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        """Returns the token ids of a text or of messages."""
        service = models.service
        service.check_model(body.model)
        ids = await asyncio.to_thread(service.tokenize, body)
        reply: dict[str, Any] = {"count": len(ids), "max_model_len": None, "tokens": list(ids)}
        if body.return_token_strs:
            token_bytes = service.tokenizer.token_bytes
            reply["token_strs"] = [token_bytes(t).decode(errors="replace") for t in ids]
        return reply

    @app.post("/v1/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        """Returns the text of token ids."""
        service = models.service
        service.check_model(body.model)
        service.check_tokens(body.tokens, "tokens")
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}


async def _model(models: ServedModels, name: str | None) -> Model:
    await models.look()
    service = models.service
    service.check_model(name)
    card = service.card
    return Model(
        id=card.name,
        created=card.created,
        fingerprint=card.fingerprint,
        capacity=card.capacity,
        sinks=card.sinks,
        sessions=card.sessions,
        bytes_per_session=card.bytes_per_session,
        persistent=card.persistent,
    )


def _checked(session_id: str) -> str:
    if not is_session_id(session_id):
        message = f"the session {session_id[:40]!r} does not exist"
        raise ApiError(404, "session_not_found", message, param="session_id")
    return session_id


def _described(state: SessionState) -> dict[str, Any]:
    return {"object": "session", **asdict(state)}
