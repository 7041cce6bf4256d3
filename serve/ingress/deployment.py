"""How every Serve application is built: HTTP replicas, model replicas and telemetry."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from serve.ingress.application import IngressParts
from serve.ingress.middleware import RequestMetrics
from serve.ingress.model_handle import Card, DeployedModel, InProcess, LocalModel, ModelHandle
from serve.ingress.settings import ApplicationSettings, PlacedSettings
from serve.telemetry import Reporter, Telemetry

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

    With `placement=together` the HTTP replicas hold the model, and there are no others.

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
    if isinstance(settings, PlacedSettings) and settings.placement == "together":
        kind: type[Any] = model.func_or_class  # type: ignore[assignment]
        both = with_model(ingress, settings, model)
        return both.bind(settings, InProcess(kind), telemetry, **known)
    bound = model.bind(settings, telemetry, **known)
    return ingress_deployment(ingress, settings).bind(settings, bound, telemetry, **known)


def ingress_deployment(ingress: type[Any], settings: ApplicationSettings) -> ray_serve.Deployment:
    """Returns the deployment of an application's HTTP replicas."""
    make = ray_serve.deployment(name=ingress.__name__, **ingress_options(settings))
    return make(ingress)


def with_model(
    ingress: type[Any], settings: ApplicationSettings, model: ray_serve.Deployment
) -> ray_serve.Deployment:
    """Returns the deployment of HTTP replicas that hold the model.

    They are as many, and have as many CPUs and GPUs, as the model's own replicas would. In all else
    they are HTTP replicas.
    """
    return model.options(
        func_or_class=ingress,
        name=ingress.__name__,
        request_router_config=RequestRouterConfig(),
        **http_options(settings),
    )


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
        **http_options(settings),
    }


def http_options(settings: ApplicationSettings) -> dict[str, Any]:
    """Returns the options of every deployment that answers HTTP."""
    return {
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


class IngressReplica(ABC, Generic[Settings]):
    """HTTP replica of an application.

    A subclass names the model's deployment and builds the application.

    Args:
        settings: the application's.
        model: handle of the model's deployment, which has `describe`; or the model to hold.
        telemetry: handle of `Telemetry`.
        card: the model that the application was built for; None if it takes any.
    """

    model_name: ClassVar[str]
    check_health: Callable[[], None]
    """Serve's hook. Only a replica that holds the model has it: the model's own."""

    def __init__(
        self, settings: Settings, model: Any, telemetry: Any, card: Card | None = None
    ) -> None:
        self.settings, self._telemetry = settings, telemetry
        self.model: ModelHandle
        if isinstance(model, InProcess):
            held = model.kind(settings, telemetry, card=card)
            self.model, self.check_health = LocalModel(held), held.check_health
        else:
            self.model = DeployedModel(model, self.model_name, card)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the application; called by Serve once."""
        metrics = RequestMetrics()
        self._reporter = Reporter(metrics.registry, self._telemetry)
        parts = IngressParts(
            settings=self.settings,
            metrics=metrics,
            scrape=self._reporter.scrape,
            is_ready=self.model.is_ready,
            api_key=read_api_key(self.settings),
        )
        return await self.create_app(parts)

    @abstractmethod
    async def create_app(self, parts: IngressParts) -> FastAPI:
        """Returns the application.

        Args:
            parts: what every application needs.
        """
