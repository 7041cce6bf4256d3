"""The parts of benchmarks/serving/serving.py that only a run with Ray, or its end, would reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tyro

from benchmarks.serving import load, our_endpoint, serving
from benchmarks.serving.model import Model
from benchmarks.serving.serve_batch import ServeBatchEmbedder
from benchmarks.serving.servers import arguments, endpoint_options
from helpers.serve.embeddings import save_tiny_artifact
from serve.embeddings.replica.embedder import Embedder
from serve.ingress.model_handle import InProcess


@pytest.mark.parametrize(
    ("placement", "batching", "embedder"),
    [
        ("separate", "ours", Embedder),
        ("separate", "serve.batch", ServeBatchEmbedder),
        ("together", "ours", Embedder),
    ],
)
def test_our_endpoint_understands_what_it_is_given(
    placement: str, batching: str, embedder: type, tmp_path: Path
) -> None:
    save_tiny_artifact(tmp_path / "tiny")
    model = Model(dtype="fp32", threads=3, max_wait_ms=1.5)
    options = endpoint_options(model, str(tmp_path / "tiny"), 1234, placement, batching)
    given = arguments(options)
    config = tyro.cli(our_endpoint.Config, args=given)
    assert (config.model, config.port) == (model, 1234)
    ingress = our_endpoint.application(config)._bound_deployment
    settings, bound = ingress.init_args[:2]
    assert (settings.dtype, settings.threads, settings.max_wait_ms) == ("fp32", 3, 1.5)
    held = isinstance(bound, InProcess)
    assert (bound.kind if held else bound._bound_deployment.func_or_class) is embedder
    assert held == (placement == "together")


def test_load_test_s_table_and_client() -> None:
    def a_round(rate: float) -> dict[str, Any]:
        bare = [{"images_per_s": speed, "cpu_ms_per_image": 180.0} for speed in (9.0, 11.0)]
        level = {
            "concurrency": 32,
            "requests": 100,
            "errors": 1,
            "images_per_s": rate,
            "p50_ms": 900.0,
            "p99_ms": 1200.0,
            "cpu_ms_per_request": {"Ingress": 5.0, "client": 0.2},
        }
        return {"bare": bare, "concurrent": bare[1], "levels": {"endpoint": [level]}}

    text = serving.table([a_round(8.0), a_round(7.0), a_round(8.5)])
    row = "| endpoint, 32 clients | 0.80 (0.70 to 0.85) | 8.0 (7.0 to 8.5) | 900 | 1200 | 3 / 300 |"
    assert row in text
    assert "| bare loop | 1 | 10.0 | | | |" in text
    assert "- endpoint, 32: Ingress 5.0, client 0.2" in text
    assert text.endswith(
        "\nresult: of the bare loop, by clients: endpoint 0.80 (0.70 to 0.85) at 32"
    )
    assert load.role_of("ray::ServeReplica:bench:Ingress") == "Ingress"
    (request,) = load.make_requests(load.Target(port=1234), [b"abc"])
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
