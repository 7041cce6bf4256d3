"""How every Serve application is built: HTTP replicas, model replicas and telemetry."""

from __future__ import annotations

import asyncio
import os
import re
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Protocol, TypeVar

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
"""Requests that Serve passes to an ingress replica at the same time. It is large because a request
whose body has not arrived counts too. What is processed is limited by `RequestLimits`, whose errors
are in OpenAI's form; Serve's are plain text."""
SURGE_PERCENT = 25
"""In an update, so many more ingress replicas may run than are wanted, rounded up: one more for up
to four. A new one runs before an old one is stopped; otherwise a single one would leave nobody to
answer until its last stream has ended. More at once would only ask for more room."""

_VISIBLE = re.compile(r"[!-~]+")


Settings = TypeVar("Settings", bound=ApplicationSettings)


def build_application(
    settings: ApplicationSettings,
    model: ray_serve.Deployment,
    ingress: type[Any],
    **known: Any,
) -> ray_serve.Application:
    """Returns an application of HTTP replicas, model replicas and one replica of `Telemetry`.

    Args:
        settings: the application's.
        model: deployment of a class that takes the settings and a handle of `Telemetry`.
        ingress: subclass of `IngressReplica` with the decorator `@ray_serve.ingress()`.
        known: further arguments of both classes.
    """
    make = ray_serve.deployment(
        name=Telemetry.__name__, ray_actor_options={"num_cpus": 0}, logging_config=QUIET
    )
    telemetry = make(Telemetry).bind()
    bound = model.bind(settings, telemetry, **known)
    return ingress_deployment(ingress, settings).bind(settings, bound, telemetry, **known)


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
        "graceful_shutdown_timeout_s": settings.drain_s,
        "logging_config": QUIET,
    }


def ingress_options(settings: ApplicationSettings) -> dict[str, Any]:
    """Returns the options of the deployment of HTTP replicas."""
    return {
        "num_replicas": settings.ingress_replicas,
        "ray_actor_options": {"num_cpus": settings.ingress_cpus},
        "max_ongoing_requests": MAX_ONGOING,
        # No limit: Serve counts a request as queued until it has found a replica, so that a limit
        # would refuse requests of a burst although every replica is idle.
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "max_surge_percent": SURGE_PERCENT,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "max_constructor_retry_count": 2,
        "logging_config": {"enable_access_log": settings.access_log},
    }


def read_api_key(settings: ApplicationSettings) -> str | None:
    """Returns the key that clients must send; None if the settings ask for no key.

    Raises:
        ValueError: the settings ask for a key, and the variable holds none that clients can send.
            Starting anyway would let everyone in, or nobody.
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


class Card(Protocol):
    """What an application knows of a model."""

    @property
    def name(self) -> str:
        """Its name in requests."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that makes it another model."""


class Readiness:
    """Tells whether a model replica is running, looked up at most once a second.

    Serve's controller is asked first, because under load a call to the model would wait behind the
    requests, and a busy model is ready. But the controller forgets the deployments of an
    application whose latest config it could not build, although they go on serving. So if it says
    no, a replica's own answer counts. The answer also tells which model it serves.

    Args:
        model: handle of the model's deployment, which has `describe`.
        name: name of that deployment.
        own: the model that this ingress was deployed with; None if it takes any.
    """

    def __init__(self, model: Any, name: str, own: Card | None = None) -> None:
        self._model, self._name, self._own = model, name, own
        self._app_name = ray_serve.get_replica_context().app_name
        self._checked_at = -READY_CACHE_S
        self._ready: bool | str = False

    async def __call__(self) -> bool | str:
        """Returns whether requests can be served, or what else there is to say if they can."""
        if time.monotonic() - self._checked_at >= READY_CACHE_S:
            self._checked_at = time.monotonic()
            self._ready = await self._look()
        return self._ready

    async def _look(self) -> bool | str:
        found, listed = await asyncio.gather(self._ask(), asyncio.to_thread(self._is_listed))
        if found is None:
            return listed
        if self._own is None or found.fingerprint == self._own.fingerprint:
            return True
        return (
            f"ok, but a replica serves {_told(found)}, and this one was deployed with "
            f"{_told(self._own)}: an update goes on, or new replicas do not start"
        )

    async def _ask(self) -> Card | None:
        try:
            async with asyncio.timeout(READY_CACHE_S):
                card: Card = await self._model.describe.remote()
        except (TimeoutError, RayError, RayServeException):
            return None
        return card

    def _is_listed(self) -> bool:
        application = ray_serve.status().applications.get(self._app_name)
        deployment = application and application.deployments.get(self._name)
        # Annotated as an enum, but the controller sends plain strings.
        states: dict[Any, int] = dict(deployment.replica_states) if deployment else {}
        return states.get("RUNNING", 0) > 0


def _told(card: Card) -> str:
    return f"{card.name} ({card.fingerprint[:12]})"


class IngressReplica(ABC, Generic[Settings]):
    """HTTP replica of an application.

    A subclass names the model's deployment and builds the application.

    Args:
        settings: the application's.
        model: handle of the model's deployment, which has `describe`.
        telemetry: handle of `Telemetry`.
        card: the model that the application was built for; None if it takes any.
    """

    model_name: ClassVar[str]

    def __init__(
        self, settings: Settings, model: Any, telemetry: Any, card: Card | None = None
    ) -> None:
        self.settings, self.model, self._own = settings, model, card
        self._telemetry = telemetry

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the application; called by Serve once."""
        metrics = RequestMetrics()
        self._reporter = Reporter(metrics.registry, self._telemetry)
        parts = IngressParts(
            settings=self.settings,
            metrics=metrics,
            scrape=self._reporter.scrape,
            is_ready=Readiness(self.model, self.model_name, self._own),
            api_key=read_api_key(self.settings),
        )
        return await self.create_app(parts)

    @abstractmethod
    async def create_app(self, parts: IngressParts) -> FastAPI:
        """Returns the application.

        Args:
            parts: what every application needs.
        """
