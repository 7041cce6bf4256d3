"""The FastAPI application of the planning server: its routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

from models.image_size import height_width
from serve.ingress.application import IngressParts, create_app
from serve.ingress.bodies import answer_in_time, check_content_type, describe_body
from serve.planning.contract import PlanCard
from serve.planning.frontend.schemas import (
    Model,
    PlanRequest,
    PlanResponse,
    PredictRequest,
    PredictResponse,
)
from serve.planning.frontend.service import PlanningService
from serve.replicas.model_routes import add_model_routes


def create_planning_app(parts: IngressParts, service: PlanningService) -> FastAPI:
    """Returns the application of one replica.

    Args:
        parts: what every application needs.
        service: answers requests; it is closed with the application.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    async def find_model(name: str | None) -> Model:
        return _model(service, service.model.named(name))

    def add_routes(app: FastAPI) -> None:
        _add_planning_routes(app, service)
        add_model_routes(app, Model, find_model)

    return create_app(
        parts,
        add_routes,
        summary="Plans and predictions of a world model.",
        max_requests=service.settings.max_queued,
        lifespan=lifespan,
    )


def _add_planning_routes(app: FastAPI, service: PlanningService) -> None:
    @app.post(
        "/v1/plan",
        response_model=None,
        responses={200: {"model": PlanResponse}},
        openapi_extra=describe_body(PlanRequest),
    )
    async def plan(request: Request) -> Response:
        """Returns what to do now on the way to a goal, and what is expected to happen."""
        check_content_type(request)
        return await answer_in_time(request, service.plan, service.settings.timeout_s)

    @app.post(
        "/v1/predict",
        response_model=None,
        responses={200: {"model": PredictResponse}},
        openapi_extra=describe_body(PredictRequest),
    )
    async def predict(request: Request) -> Response:
        """Returns what is expected to follow from actions."""
        check_content_type(request)
        return await answer_in_time(request, service.predict, service.settings.timeout_s)


def _model(service: PlanningService, card: PlanCard) -> Model:
    return Model(
        id=card.name,
        created=service.created,
        fingerprint=card.fingerprint,
        world=card.world,
        image_size=list(height_width(card.preprocessing.image_size)),
        history=card.history,
        dimensions=card.state_width,
        action_width=card.action_width,
        actions=dict(card.actions),
        methods=list(card.methods),
        judged_by=card.judged_by,
        predictors=card.predictors,
        places=card.reads_places,
        task=dict(card.task),
    )
