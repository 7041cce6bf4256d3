"""The model in the HTTP replicas (`placement=together`) over real HTTP, beside one of its own."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from helpers.models.video_files import write_video
from helpers.serve.asking import asking
from helpers.serve.embeddings import (
    data_uri,
    encoded,
    miss_killed_replicas_soon,
    picture,
    png_uri,
    save_tiny_artifact,
)
from helpers.serve.processes import replica_pids
from helpers.waiting import wait_until

pytestmark = pytest.mark.ray

APP = f"placed{os.getpid()}"
PLACED: dict[str, dict[str, Any]] = {
    "separate": {"ingress_cpus": 0.1},
    "together": {"num_replicas": 2, "max_image_bytes": 60_000, "max_queued": 8},
}
PICTURES = [png_uri(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def urls(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where an application of each placement answers, for the same artifact."""
    from ray import serve as ray_serve

    from serve import app
    from serve.embeddings.settings import ServeSettings

    folder: Path = tmp_path_factory.mktemp("artifact") / "tiny"
    save_tiny_artifact(folder)
    shared = {"artifact": str(folder), "threads": 1, "cpus": 0.1, "max_items": 4}
    with pytest.MonkeyPatch.context() as patch:
        miss_killed_replicas_soon(patch, app)
        for placement, own in PLACED.items():
            chosen = ServeSettings.model_validate(shared | own | {"placement": placement})
            name, prefix = f"{APP}-{placement}", f"/{placement}"
            ray_serve.run(app.build_app(chosen), name=name, route_prefix=prefix)
        yield {placement: f"{serve_url}/{placement}" for placement in PLACED}
        for placement in PLACED:
            ray_serve.delete(f"{APP}-{placement}")


@pytest.fixture(scope="module")
def together(urls: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=urls["together"], timeout=60) as client:
        yield client


def test_both_placements_give_the_same_answers(urls: dict[str, str]) -> None:
    video = write_video(io.BytesIO(), 30, container="mp4").getvalue()
    bodies: list[dict[str, Any]] = [
        {"input": PICTURES[:4]},
        {"input": PICTURES[0], "pooling": "patches", "normalize": False},
        {"input": {"image": PICTURES[1]}, "exclude": [[0, 0, 0.5, 0.5]], "dimensions": 8},
        {"input": {"video": data_uri(video, "video/mp4"), "fps": 4}, "pooling": "per_frame"},
    ]
    assert not replica_pids(f"{APP}-together", "Embedder")
    assert replica_pids(f"{APP}-separate", "Embedder")
    for body in bodies:
        one, two = (
            httpx.post(f"{url}/v1/embeddings", json=body, timeout=60) for url in urls.values()
        )
        assert (one.status_code, two.status_code) == (200, 200)
        told, other = one.json(), two.json()
        for entry, twin in zip(told["data"], other["data"], strict=True):
            vector, expected = (np.array(each.pop("embedding")) for each in (entry, twin))
            np.testing.assert_allclose(vector, expected, atol=1e-5)
        assert told == other  # the fingerprint, too: where it runs makes no other model


def test_a_stream_runs_in_one_process(urls: dict[str, str]) -> None:
    with connect(f"{urls['together'].replace('http', 'ws')}/v1/streams") as socket:
        socket.send('{"type": "start", "every": 1}')
        assert json.loads(socket.recv(timeout=30))["type"] == "started"
        for number in range(3):
            socket.send(encoded(picture(number), "JPEG"))
            assert json.loads(socket.recv(timeout=30))["last_frame"] == number


def test_limits_and_errors_are_typed(together: httpx.Client) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"input": data_uri(encoded(picture(0))[:150])}, 400, "truncated"),
        ({"input": PICTURES[:5]}, 400, "too_many_items"),
        ({"input": data_uri(bytes(70_000))}, 413, "image_too_large"),
        ({"input": PICTURES[0], "model": "another"}, 404, "model_not_found"),
        ({"input": PICTURES[0], "dimension": 3}, 400, "unknown_field"),
    ]
    for body, status, code in cases:
        reply = together.post("/v1/embeddings", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_overload_is_shed_by_typed_errors(together: httpx.Client) -> None:
    """Both replicas together take 16 images; of 24 requests of four most are too many."""

    def post(_: int) -> httpx.Response:
        return together.post("/v1/embeddings", json={"input": PICTURES[:4]})

    with ThreadPoolExecutor(24) as threads:
        replies = list(threads.map(post, range(48)))
    refused = [reply for reply in replies if reply.status_code != 200]
    assert 0 < len(refused) < len(replies)
    assert {reply.json()["error"]["code"] for reply in refused} == {"queue_full"}
    assert {reply.headers["retry-after"] for reply in refused} == {"1"}


def test_health_and_metrics_of_one_process(together: httpx.Client) -> None:
    assert together.get("/healthz").text == "ok"
    assert together.post("/v1/embeddings", json={"input": PICTURES[0]}).status_code == 200
    # The part that embeds reports by itself, every five seconds.
    wait_until(lambda: "rayjepa_images_total" in together.get("/metrics").text, every_s=0.2)
    text = together.get("/metrics").text
    for name in ("rayjepa_batch_size_count", "rayjepa_forward_seconds_count"):
        assert name in text
    assert 'rayjepa_requests_total{route="/v1/embeddings",status="200"}' in text


def test_a_killed_replica_loses_no_request_that_is_sent_again(urls: dict[str, str]) -> None:
    with asking(urls["together"], PICTURES[:4]) as clients:
        clients.wait_for_all()
        os.kill(replica_pids(f"{APP}-together", "Ingress")[0], signal.SIGKILL)
        clients.wait_for_more(50)
    assert not clients.failures
