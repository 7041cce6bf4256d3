"""Starts the servers that the serving benchmark compares, each on a free port of loopback."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.load import HOST, Target

APP, STARTED_WITHIN_S = "bench", 240.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that every server has, and its threads."""

    preset: str = "vit_s"
    """Row of `models.encoders.shape.PRESETS`."""
    image_size: int = 224
    """Pixels on a side of the encoder's input."""
    patch_size: int = 16
    """Pixels on a side of a patch."""
    dtype: str = "bf16"
    """fp32 or bf16."""
    threads: int = 2
    """Torch threads."""
    decode_threads: int = 2
    """Threads that decode pictures."""
    batch_size: int = 32
    """Images in one forward pass at most; the bare loop's batches are always full."""
    max_wait_ms: float = 2.0
    """See `ServeSettings.max_wait_ms`."""


Server = Callable[[Model, str], AbstractContextManager[Target]]
"""Serves the artifact in a folder."""


def settings_for(model: Model, folder: str) -> Any:
    """Returns the settings of our endpoint."""
    from serve.embeddings.settings import ServeSettings

    return ServeSettings(
        artifact=folder,
        dtype=model.dtype,  # type: ignore[arg-type]
        threads=model.threads,
        decode_threads=model.decode_threads,
        batch_size=model.batch_size,
        max_wait_ms=model.max_wait_ms,
    )


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def endpoint(model: Model, folder: str) -> Iterator[Target]:
    """Our endpoint on a Ray of its own."""
    from serve.app import build_app

    with _served(build_app(settings_for(model, folder))) as target:
        yield target


@contextmanager
def endpoint_with_serve_batch(model: Model, folder: str) -> Iterator[Target]:
    """Our endpoint with Ray's `@serve.batch` in the place of `Batcher`."""
    from benchmarks.serving.serve_batch import ServeBatchEmbedder
    from serve.app import Ingress, model_deployment
    from serve.embeddings.replica.embedder import read_card
    from serve.ingress.deployment import build_application

    settings = settings_for(model, folder)
    deployment = model_deployment(settings).options(func_or_class=ServeBatchEmbedder)
    application = build_application(settings, deployment, Ingress, card=read_card(settings))
    with _served(application) as target:
        yield target


@contextmanager
def _served(application: Any) -> Iterator[Target]:
    import ray
    from ray import serve as ray_serve

    os.environ.pop("RAY_ADDRESS", None)
    target = Target(port=free_port())
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        ray_serve.start(http_options={"host": HOST, "port": target.port})
        ray_serve.run(application, name=APP)
        _wait_for(target.port)
        yield target
    finally:
        ray_serve.shutdown()
        ray.shutdown()


@contextmanager
def plain_fastapi(model: Model, folder: str) -> Iterator[Target]:
    """`plain_app.py`."""
    target = Target(port=free_port())
    program = pathlib.Path(__file__).with_name("plain_app.py")
    options = {
        "--artifact": folder,
        "--port": target.port,
        "--dtype": model.dtype,
        "--threads": model.threads,
        "--decode-threads": model.decode_threads,
        "--batch-size": model.batch_size,
    }
    with _process(sys.executable, program, options, target.port):
        yield target


def infinity(python: str) -> Server:
    """Returns infinity's server, given the Python of the environment that holds it."""

    @contextmanager
    def serve(model: Model, folder: str) -> Iterator[Target]:
        from models.encoders.shape import PRESETS

        fields = (("model", "clip"), ("modality", "image"))
        target = Target(port=free_port(), path="/embeddings", fields=fields)
        shape = PRESETS[model.preset]
        options = {
            "--folder": f"{folder}-clip",
            "--port": target.port,
            "--width": shape.width,
            "--depth": shape.depth,
            "--heads": shape.heads,
            "--image-size": model.image_size,
            "--patch-size": model.patch_size,
            "--threads": model.threads,
            "--batch-size": model.batch_size,
        }
        program = pathlib.Path(__file__).with_name("peer_infinity.py")
        with _process(python, program, options, target.port):
            yield target

    return serve


@contextmanager
def _process(
    python: str, program: pathlib.Path, options: dict[str, Any], port: int
) -> Iterator[None]:
    arguments = [str(part) for pair in options.items() for part in pair]
    command = [python, str(program), *arguments]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            _wait_for(port)
            yield
        finally:
            process.terminate()


def _wait_for(port: int) -> None:
    """Returns when a server listens; it has then loaded its model."""
    deadline = time.monotonic() + STARTED_WITHIN_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port} after {STARTED_WITHIN_S:.0f} s")
