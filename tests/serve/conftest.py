"""Ray Serve, started once for all tests of serving that run on the session's Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.serve.free_ports import free_ports


@pytest.fixture(scope="package")
def serve_url(ray_local: None) -> Iterator[str]:
    """Where Serve listens; a module deploys its applications there, and deletes them at its end."""
    from ray import serve as ray_serve

    (port,) = free_ports(1)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()
