"""The Serve application: `serve run serve.lm_app:build_app model=DIR`.

HTTP -> `LMIngress` (parse, tokenize, write events) -> `LanguageModel` (the engine; a session stays
with one replica), with `Telemetry` beside them.
"""
# No `from __future__ import annotations` here: Serve reads `build_app`'s annotation as a class.

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.config import RequestRouterConfig

from serve.ingress.deployment import (
    QUIET,
    Readiness,
    bind_telemetry,
    ingress_options,
    read_api_key,
)
from serve.ingress.gate import RequestMetrics
from serve.lm.contract import LANGUAGE_MODEL
from serve.lm.frontend.client import LMClient
from serve.lm.frontend.routes import LMParts, create_lm_app
from serve.lm.frontend.service import LanguageService
from serve.lm.settings import LMSettings
from serve.telemetry import Reporter

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@ray_serve.ingress()
class LMIngress:
    """HTTP replica.

    Args:
        settings: see `LMSettings`.
        model: handle of `LanguageModel`.
        telemetry: handle of `Telemetry`.
    """

    def __init__(self, settings: LMSettings, model: Any, telemetry: Any) -> None:
        self._settings = settings
        self._model = model
        self._telemetry = telemetry

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is constructed; waits for a model replica."""
        from models.sink_lm.checkpoints.tokenizer import load_tokenizer

        settings = self._settings
        card = await self._model.describe.remote()
        metrics = RequestMetrics()
        self._reporter = Reporter(metrics.registry, self._telemetry)
        parts = LMParts(
            settings=settings,
            service=LanguageService(settings, card, load_tokenizer(settings.model)),
            client=LMClient(self._model, persistent=card.persistent),
            metrics=metrics,
            scrape=self._scrape,
            is_ready=Readiness(self._model, LANGUAGE_MODEL),
            api_key=read_api_key(settings),
        )
        return create_lm_app(parts)

    async def _scrape(self) -> str:
        return await self._reporter.scrape()


def build_app(args: LMSettings) -> ray_serve.Application:
    """Builds the application; Serve calls it with the command line's or config file's `args`."""
    args = _absolute(args)
    telemetry = bind_telemetry()
    model = _model_deployment(args).bind(args, telemetry)
    return _ingress_deployment(args).bind(args, model, telemetry)


def _absolute(settings: LMSettings) -> LMSettings:
    """Local paths in full: replicas may run in another directory."""
    changes = {}
    if Path(settings.model).exists():
        changes["model"] = str(Path(settings.model).resolve())
    if settings.store is not None and "://" not in settings.store:
        changes["store"] = str(Path(settings.store).resolve())
    if settings.name is None:
        changes["name"] = settings.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return settings.model_copy(update=changes)


def _model_deployment(settings: LMSettings) -> ray_serve.Deployment:
    from serve.lm.replica.language_model import (
        LanguageModel,  # only here: ingress replicas import this file
    )

    make = ray_serve.deployment(
        name=LANGUAGE_MODEL,
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # A waiting `take` costs nothing, and a session must never go to another replica because
        # its own is busy: the limit lies above all that ingress replicas hold.
        max_ongoing_requests=4 * settings.max_requests * settings.ingress_replicas,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,  # type: ignore[arg-type]
            request_router_kwargs={"num_fallback_replicas": 0},
        ),
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=30,
        health_check_period_s=5,
        logging_config=QUIET,
    )
    return make(LanguageModel)


def _ingress_deployment(settings: LMSettings) -> ray_serve.Deployment:
    make = ray_serve.deployment(name=LMIngress.__name__, **ingress_options(settings))
    return make(LMIngress)
