"""The Serve application: `serve run serve.app:build_app artifact=DIR`.

HTTP -> `Ingress` (parse, decode, transform on CPU) -> `Embedder` (batched forward pass), with
`Telemetry` beside them. Ingress and embedder scale apart, because decoding JPEGs for one GPU takes
many cores. Nothing happens at import: all state belongs to replicas.
"""
# No `from __future__ import annotations` here: Serve reads `build_app`'s annotation as a class.

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import Gauge
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)

from serve.contract import EMBEDDER, Floats, Pixels, Pooling
from serve.http_api import Limits, Parts, RequestMetrics, create_http_app
from serve.lm_settings import LMSettings
from serve.schemas import queue_full, server_error
from serve.service import EmbeddingService
from serve.settings import ServeSettings
from serve.streams import StreamHub
from serve.telemetry import Reporter, Telemetry

EMBED_ATTEMPTS = 3
"""Calls made for one request when embedder replicas die under it."""
READY_CACHE_S = 1.0
_QUIET = {"enable_access_log": False}


class EmbedderClient:
    """Calls the embedder deployment and turns its failures into API errors.

    Args:
        handle: Serve handle of `Embedder`.
    """

    def __init__(self, handle: Any) -> None:
        self._embed = handle.embed

    async def embed(self, pixels: Pixels, pooling: Pooling) -> Floats:
        """See `Embedder.embed`. Safe to repeat, so a replica's death costs time, not the request.

        Raises:
            ApiError: 429 when the embedder's queue is full, 503 when there is no embedder.
        """
        for _ in range(EMBED_ATTEMPTS):
            try:
                embeddings: Floats = await self._embed.remote(pixels, pooling)
                return embeddings
            except RayActorError:
                continue
            except BackPressureError as error:
                raise queue_full() from error
            except DeploymentUnavailableError:
                break
        raise server_error(503, "no_replica", "no model replica could take the request")


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

    def __init__(self, model: Any, name: str = EMBEDDER) -> None:
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


@ray_serve.ingress()
class Ingress:
    """HTTP replica.

    Args:
        settings: see `ServeSettings`.
        embedder: handle of `Embedder`.
        telemetry: handle of `Telemetry`.
    """

    def __init__(self, settings: ServeSettings, embedder: Any, telemetry: Any) -> None:
        self._settings = settings
        self._embedder = embedder
        self._telemetry = telemetry

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is constructed; waits for a model replica."""
        settings = self._settings
        card = await self._embedder.describe.remote()
        embed, request_metrics = EmbedderClient(self._embedder).embed, RequestMetrics()
        service = EmbeddingService(settings, card, embed)
        if card.frames > 1 and settings.decode_processes:
            await service.media.decoders.warm_up()
        registry = request_metrics.registry
        parts = Parts(
            service=service,
            metrics=request_metrics,
            streams=StreamHub(settings, card, embed, service.media, registry),
            limits=Limits(settings.max_request_bytes, settings.timeout_s),
            scrape=self._scrape,
            is_ready=Readiness(self._embedder),
            api_key=read_api_key(settings),
        )
        admission = service.admission
        images = Gauge("rayjepa_images_in_flight", "Images waiting or running", registry=registry)
        images.set_function(lambda: admission.images)
        self._reporter = Reporter(registry, self._telemetry)
        return create_http_app(parts)

    async def _scrape(self) -> str:
        return await self._reporter.scrape()


def read_api_key(settings: ServeSettings | LMSettings) -> str | None:
    """The key clients must send, or None when none is asked for.

    Raises:
        ValueError: a key is asked for and there is none; serving anyone would be worse.
    """
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "")
    if not key:
        raise ValueError(f"api_key_env names {settings.api_key_env}, which is not set here")
    return key


def build_app(args: ServeSettings) -> ray_serve.Application:
    """Builds the application; Serve calls it with the command line's or config file's `args`."""
    path = Path(args.artifact)
    if path.exists():  # replicas may run in another directory
        args = args.model_copy(update={"artifact": str(path.resolve())})
    make_telemetry = ray_serve.deployment(
        name=Telemetry.__name__, ray_actor_options={"num_cpus": 0}, logging_config=_QUIET
    )
    telemetry = make_telemetry(Telemetry).bind()
    embedder = _embedder_deployment(args).bind(args, telemetry)
    return _ingress_deployment(args).bind(args, embedder, telemetry)


def _embedder_deployment(settings: ServeSettings) -> ray_serve.Deployment:
    from serve.embedder import Embedder  # only here: ingress replicas import this file

    options: dict[str, Any] = {"num_replicas": settings.num_replicas}
    if settings.max_replicas is not None:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.num_replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_ongoing,
            )
        }
    make = ray_serve.deployment(
        name=EMBEDDER,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # The batch that runs, the next one, and room to choose: more would only wait here
        # instead of in the ingress, where another replica can still take it.
        max_ongoing_requests=3 * settings.batch_size,
        max_queued_requests=settings.max_queued,
        max_constructor_retry_count=2,
        logging_config=_QUIET,
        **options,
    )
    return make(Embedder)


def _ingress_deployment(settings: ServeSettings) -> ray_serve.Deployment:
    make = ray_serve.deployment(
        name=Ingress.__name__,
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        # Above our own limits on images and streams, so that overload gets our typed 429; Serve's
        # own, with a plain-text body, is the second line.
        max_ongoing_requests=settings.max_queued + settings.max_streams + 64,
        max_queued_requests=settings.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_constructor_retry_count=2,
        logging_config={"enable_access_log": settings.access_log},
    )
    return make(Ingress)
