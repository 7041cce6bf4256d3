"""Starts the servers that the serving benchmark compares, each on a free port of loopback."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from benchmarks.serving.load import HOST, Target
from benchmarks.serving.model import Model

STARTED_WITHIN_S, ENDED_WITHIN_S = 240.0, 60.0
THROUGHPUT = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
}
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
END_AT_ONCE = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1"}

Server = Callable[[Model, str], AbstractContextManager[Target]]
"""Serves the artifact in a folder."""


def endpoint(
    environment: Mapping[str, str], *, placement: str = "separate", batching: str = "ours"
) -> Server:
    """Returns our endpoint.

    Args:
        environment: of Ray and Serve.
        placement: see `our_endpoint.Config`.
        batching: as well.
    """

    @contextmanager
    def serve(model: Model, folder: str) -> Iterator[Target]:
        target = Target(port=free_port())
        # Two HAProxies on one machine cannot share these.
        ports = {
            f"RAY_SERVE_HAPROXY_{kind}_PORT": str(free_port()) for kind in ("STATS", "METRICS")
        }
        env = {**environment, **END_AT_ONCE, **ports}
        options = endpoint_options(model, folder, target.port, placement, batching)
        url = f"http://{HOST}:{target.port}/healthz"
        with _process(sys.executable, "our_endpoint.py", options, url, env):
            yield target

    return serve


def endpoint_options(
    model: Model, folder: str, port: int, placement: str, batching: str
) -> dict[str, Any]:
    """Returns the options of `our_endpoint.py`."""
    fields = dataclasses.asdict(model).items()
    options = {f"model.{name.replace('_', '-')}": value for name, value in fields}
    served = {"folder": folder, "port": port, "placement": placement, "batching": batching}
    return served | options


@contextmanager
def plain_fastapi(model: Model, folder: str) -> Iterator[Target]:
    """`plain_app.py`."""
    target = Target(port=free_port())
    options = {
        "artifact": folder,
        "port": target.port,
        "dtype": model.dtype,
        "threads": model.threads,
        "decode-threads": model.decode_threads,
        "batch-size": model.batch_size,
    }
    url = f"http://{HOST}:{target.port}/openapi.json"
    with _process(sys.executable, "plain_app.py", options, url):
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
            "folder": f"{folder}-clip",
            "port": target.port,
            "width": shape.width,
            "depth": shape.depth,
            "heads": shape.heads,
            "image-size": model.image_size,
            "patch-size": model.patch_size,
            "threads": model.threads,
            "batch-size": model.batch_size,
        }
        url = f"http://{HOST}:{target.port}/health"
        with _process(python, "peer_infinity.py", options, url):
            yield target

    return serve


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Returns options as a command line has them."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _process(
    python: str,
    program: str,
    options: Mapping[str, Any],
    url: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Runs a program of this folder, from its first answer to the end of the block."""
    path = pathlib.Path(__file__).with_name(program)
    command = [python, str(path), *arguments(options)]
    env = os.environ | dict(environment or {})
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=env) as process:
        try:
            _wait_for(url, process)
            yield
        finally:
            process.terminate()
            try:
                process.wait(ENDED_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when a server answers; it has then loaded its model."""
    deadline = time.monotonic() + STARTED_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"{url} does not answer after {STARTED_WITHIN_S:.0f} s")
