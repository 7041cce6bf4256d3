"""The Serve application: `serve run serve.app:build_app artifact=DIR`.

HTTP -> `Ingress` (parse, decode, transform on CPU) -> `Embedder` (batched forward pass), with
`Telemetry` beside them. Ingress and embedder scale apart, because decoding JPEGs for one GPU takes
many cores. Nothing happens at import: all state belongs to replicas.
"""
# No `from __future__ import annotations` here: Serve reads `build_app`'s annotation as a class.

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import Gauge
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.embeddings.contract import EMBEDDER, Floats, Pixels, Pooling
from serve.embeddings.frontend.routes import Limits, Parts, create_http_app
from serve.embeddings.frontend.service import EmbeddingService
from serve.embeddings.settings import ServeSettings
from serve.embeddings.streams.stream import StreamHub
from serve.ingress.deployment import (
    QUIET,
    Readiness,
    bind_telemetry,
    ingress_options,
    read_api_key,
)
from serve.ingress.errors import queue_full, server_error
from serve.ingress.gate import RequestMetrics
from serve.ingress.intake import Intake
from serve.telemetry import Reporter

EMBED_ATTEMPTS = 3
"""Calls made for one request when embedder replicas die under it."""


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
            intake=Intake(settings, max_requests=settings.max_queued),  # one image each at least
            scrape=self._scrape,
            is_ready=Readiness(self._embedder, EMBEDDER),
            api_key=read_api_key(settings),
            cors_origins=settings.cors_origins,
        )
        admission = service.admission
        images = Gauge("rayjepa_images_in_flight", "Images waiting or running", registry=registry)
        images.set_function(lambda: admission.images)
        self._reporter = Reporter(registry, self._telemetry)
        return create_http_app(parts)

    async def _scrape(self) -> str:
        return await self._reporter.scrape()


def build_app(args: ServeSettings) -> ray_serve.Application:
    """Builds the application; Serve calls it with the command line's or config file's `args`."""
    path = Path(args.artifact)
    if path.exists():  # replicas may run in another directory
        args = args.model_copy(update={"artifact": str(path.resolve())})
    telemetry = bind_telemetry()
    embedder = _embedder_deployment(args).bind(args, telemetry)
    return _ingress_deployment(args).bind(args, embedder, telemetry)


def _embedder_deployment(settings: ServeSettings) -> ray_serve.Deployment:
    from serve.embeddings.replica.embedder import (
        Embedder,  # only here: ingress replicas import this file
    )

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
        logging_config=QUIET,
        **options,
    )
    return make(Embedder)


def _ingress_deployment(settings: ServeSettings) -> ray_serve.Deployment:
    make = ray_serve.deployment(name=Ingress.__name__, **ingress_options(settings))
    return make(Ingress)
