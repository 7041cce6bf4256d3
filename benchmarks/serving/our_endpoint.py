"""Our endpoint on a Ray of its own, until it is terminated; serving.py starts it.

    python benchmarks/serving/our_endpoint.py --folder demo-out/encoder --port 8001

It is a process of its own because Ray and Serve read their environment variables only once.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
from dataclasses import dataclass, field
from typing import Literal

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

import ray
import tyro
from ray import serve as ray_serve

from benchmarks.serving.load import HOST
from benchmarks.serving.model import Model, settings_for


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is served."""

    folder: str
    """The artifact."""
    port: int
    """Port on loopback."""
    batching: Literal["ours", "serve.batch"] = "ours"
    """Who makes the batches: our batcher, or Ray's `@serve.batch` in its place."""
    placement: Literal["separate", "together"] = "separate"
    """See `ServeSettings.placement`."""
    model: Model = field(default_factory=Model)


def application(config: Config) -> ray_serve.Application:
    """Returns the application to serve."""
    from serve.app import Ingress, build_app, model_deployment
    from serve.embeddings.replica.embedder import read_card
    from serve.ingress.deployment import build_application

    settings = settings_for(config.model, config.folder, config.placement)
    if config.batching == "ours":
        return build_app(settings)
    from benchmarks.serving.serve_batch import ServeBatchEmbedder

    deployment = model_deployment(settings).options(func_or_class=ServeBatchEmbedder)
    return build_application(settings, deployment, Ingress, card=read_card(settings))


def main() -> None:
    """Serves until SIGTERM."""
    config = tyro.cli(Config)
    ended = threading.Event()
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: ended.set())  # after Ray, which sets one of its own
    try:
        ray_serve.start(http_options={"host": HOST, "port": config.port})
        ray_serve.run(application(config), name="bench")
        ended.wait()
    finally:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    main()
