"""The Serve application: `serve run serve.app:build_app artifact=DIR`.

A request goes to an `Ingress` replica, which parses it and decodes and transforms the images on the
CPU, then to an `Embedder`, which runs the forward pass in batches. With `placement=separate` that
is a replica of its own, and the two scale separately, because decoding JPEGs for one GPU takes many
cores. With `placement=together` every ingress replica holds an `Embedder`. All replicas report to
`Telemetry`.
"""
# No `from __future__ import annotations` here: Serve reads `build_app`'s annotation as a class.

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import Gauge
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig

from serve.embeddings.contract import EMBEDDER, ModelCard
from serve.embeddings.frontend.client import EmbedderClient
from serve.embeddings.frontend.routes import create_embeddings_app
from serve.embeddings.frontend.service import EmbeddingService
from serve.embeddings.settings import ServeSettings
from serve.embeddings.streams.stream import StreamHub
from serve.ingress.application import IngressParts
from serve.ingress.deployment import IngressReplica, build_application, model_options
from serve.ingress.draining import drained_from_now
from serve.replicas.served_model import ServedModel


@ray_serve.ingress()
class Ingress(IngressReplica[ServeSettings]):
    """HTTP replica: parses, decodes and transforms what clients send.

    Args:
        settings: see `ServeSettings`.
        model: handle of the embedder, or that it is held here.
        telemetry: handle of `Telemetry`.
        card: the model that this replica was deployed with.
    """

    model_name = EMBEDDER

    def __init__(
        self, settings: ServeSettings, model: Any, telemetry: Any, card: ModelCard
    ) -> None:
        super().__init__(settings, model, telemetry, card)
        self._card = card

    async def create_app(self, parts: IngressParts) -> FastAPI:
        """See `IngressReplica`."""
        card, registry = self._card, parts.metrics.registry
        client = EmbedderClient(self.model, card, silence_s=self.settings.replica_silence_s)
        model, embed = ServedModel(card), client.embed
        service = EmbeddingService(self.settings, model, embed, registry)
        if card.frames > 1 and self.settings.decode_processes:
            await service.media.decoders.warm_up()
        images = Gauge("rayjepa_images_in_flight", "Images waiting or running", registry=registry)
        images.set_function(lambda: service.admission.images)
        streams = StreamHub(self.settings, model, embed, service.media, registry)
        begun = drained_from_now(lambda: streams.streams > 0)
        self._draining = asyncio.get_running_loop().create_task(streams.drain(begun))
        return create_embeddings_app(parts, service, streams)


def build_app(args: ServeSettings) -> ray_serve.Application:
    """Returns the application; Serve calls this with `args` of the command line or config file.

    The artifact is read here once, so that all replicas know which model they belong to, and one
    that cannot be read is refused before anything is replaced.
    """
    from serve.embeddings.replica.embedder import read_card

    places = {"artifact": args.artifact, "align": args.align}
    here = {name: Path(place) for name, place in places.items() if place is not None}
    # Replicas may run in another directory.
    found = {name: str(path.resolve()) for name, path in here.items() if path.exists()}
    args = args.model_copy(update=found)
    return build_application(args, model_deployment(args), Ingress, card=read_card(args))


def model_deployment(settings: ServeSettings) -> ray_serve.Deployment:
    """Returns the deployment of `Embedder`."""
    # Imported only here: ingress replicas import this file, and need neither torch nor the model.
    from serve.embeddings.replica.embedder import Embedder

    options: dict[str, Any] = model_options(settings)
    if settings.max_replicas is not None:
        del options["num_replicas"]
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=settings.num_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing,
        )
    make = ray_serve.deployment(
        name=EMBEDDER,
        # The batch that runs, the next one, and one more. Further requests wait in the ingress,
        # from where another replica can still take them.
        max_ongoing_requests=3 * settings.batch_size,
        max_queued_requests=settings.max_queued,
        **options,
    )
    return make(Embedder)
