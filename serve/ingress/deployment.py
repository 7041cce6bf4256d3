"""How every Serve application is built: HTTP replicas, model replicas and telemetry."""

from __future__ import annotations

import asyncio
import os
import re
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException

from serve.ingress.application import IngressParts
from serve.ingress.middleware import RequestMetrics
from serve.ingress.settings import ApplicationSettings
from serve.telemetry import Reporter, Telemetry

READY_CACHE_S = 1.0
QUIET = {"enable_access_log": False}
MAX_ONGOING = 65_536
"""Requests that Serve hands to an ingress replica at once. A request without its body holds one of
these and nothing else, so there are many; what is worked on has limits of its own (`RequestLimits`), with
typed errors. Serve's refusals are plain text."""

_VISIBLE = re.compile(r"[!-~]+")


Settings = TypeVar("Settings", bound=ApplicationSettings)


def build_application(
    settings: ApplicationSettings, model: ray_serve.Deployment, ingress: type[Any]
) -> ray_serve.Application:
    """Binds an application: HTTP replicas, model replicas, and `Telemetry` beside them.

    Args:
        settings: the application's.
        model: deployment of the model's class, made with `settings` and a handle of `Telemetry`.
        ingress: an `IngressReplica`, decorated with `@ray_serve.ingress()`.
    """
    make = ray_serve.deployment(
        name=Telemetry.__name__, ray_actor_options={"num_cpus": 0}, logging_config=QUIET
    )
    telemetry = make(Telemetry).bind()
    bound = model.bind(settings, telemetry)
    return ingress_deployment(ingress, settings).bind(settings, bound, telemetry)


def ingress_deployment(ingress: type[Any], settings: ApplicationSettings) -> ray_serve.Deployment:
    """Returns the deployment of an application's HTTP replicas."""
    make = ray_serve.deployment(name=ingress.__name__, **ingress_options(settings))
    return make(ingress)


def model_options(settings: ApplicationSettings) -> dict[str, Any]:
    """Returns the options that the deployments of all models share."""
    return {
        "num_replicas": settings.num_replicas,
        "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        "max_constructor_retry_count": 2,
        "logging_config": QUIET,
    }


def ingress_options(settings: ApplicationSettings) -> dict[str, Any]:
    """Options of an ingress deployment."""
    return {
        "num_replicas": settings.ingress_replicas,
        "ray_actor_options": {"num_cpus": settings.ingress_cpus},
        "max_ongoing_requests": MAX_ONGOING,
        # Serve counts a request as queued until it has found a replica: with a limit, a burst is
        # refused although every replica is idle.
        "max_queued_requests": -1,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "max_constructor_retry_count": 2,
        "logging_config": {"enable_access_log": settings.access_log},
    }


def read_api_key(settings: ApplicationSettings) -> str | None:
    """The key clients must send, or None when none is asked for.

    Raises:
        ValueError: a key is asked for and there is none that a client could send; serving anyone, or
            nobody, would be worse.
    """
    name = settings.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"api_key_env names {name}, which is not set here, or empty")
    if not _VISIBLE.fullmatch(key):
        message = (
            "spaces, line breaks or characters other than visible ASCII, which no client can send"
        )
        raise ValueError(f"the API key in {name} has {message}")
    if key[0] == key[-1] and key[0] in "\"'`":
        raise ValueError(f"the API key in {name} is in quotes; `docker --env-file` keeps them")
    return key


class Readiness:
    """Whether a model replica is running, looked up at most once a second.

    Serve's controller is asked first: under load a question to the model would queue behind the
    requests, and busy is not the same as unready. But the controller forgets the deployments of an
    application whose latest config it could not build, while they go on serving; so a no from it
    is checked with the model.

    Args:
        model: handle of the deployment; it has `describe`.
        name: of the deployment.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name
        self._app_name = ray_serve.get_replica_context().app_name
        self._checked_at = -READY_CACHE_S
        self._ready = False

    async def __call__(self) -> bool:
        """Whether requests can be served."""
        if time.monotonic() - self._checked_at >= READY_CACHE_S:
            self._checked_at = time.monotonic()
            self._ready = await asyncio.to_thread(self._is_listed) or await self._answers()
        return self._ready

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(READY_CACHE_S):
                await self._model.describe.remote()
        except (TimeoutError, RayError, RayServeException):
            return False
        return True

    def _is_listed(self) -> bool:
        application = ray_serve.status().applications.get(self._app_name)
        deployment = application and application.deployments.get(self._name)
        # Annotated as an enum, but the controller sends plain strings.
        states: dict[Any, int] = dict(deployment.replica_states) if deployment else {}
        return states.get("RUNNING", 0) > 0


class IngressReplica(ABC, Generic[Settings]):
    """HTTP replica of an application.

    A subclass names the model's deployment and builds the application around it.

    Args:
        settings: the application's.
        model: handle of the model's deployment, which has `describe`.
        telemetry: handle of `Telemetry`.
    """

    model_name: ClassVar[str]

    def __init__(self, settings: Settings, model: Any, telemetry: Any) -> None:
        self.settings, self.model = settings, model
        self._telemetry = telemetry

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is constructed; waits for a model replica."""
        card = await self.model.describe.remote()
        metrics = RequestMetrics()
        self._reporter = Reporter(metrics.registry, self._telemetry)
        parts = IngressParts(
            settings=self.settings,
            metrics=metrics,
            scrape=self._reporter.scrape,
            is_ready=Readiness(self.model, self.model_name),
            api_key=read_api_key(self.settings),
        )
        return await self.create_app(card, parts)

    @abstractmethod
    async def create_app(self, card: Any, parts: IngressParts) -> FastAPI:
        """Builds the application.

        Args:
            card: what the model's `describe` returned.
            parts: what every application has.
        """
