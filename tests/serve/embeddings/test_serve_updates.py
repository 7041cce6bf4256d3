"""An update of the model under load, over real HTTP on a real Ray: two replicas of each kind.

Once with the model in replicas of its own, and once in the HTTP replicas.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from helpers.serve.embeddings import (
    data_uri,
    direct_tokens,
    encoded,
    miss_killed_replicas_soon,
    picture,
    save_tiny_artifact,
    unit,
)
from helpers.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.ray

APP = f"updates{os.getpid()}"
PLACED: dict[str, dict[str, Any]] = {
    "separate": {"ingress_replicas": 2, "ingress_cpus": 0.1},
    "together": {},
}
PICTURES = [encoded(picture(seed, (56, 40))) for seed in range(4)]
# Of another part of a picture and of the same size: nothing but the vector would tell a mixture.
MODELS: dict[str, dict[str, Any]] = {
    "wide": {"size": 64},
    "tight": {"size": 64, "crop_fraction": 0.5},
}


@dataclass
class Load:
    """A client that asks one thing after the other, until it is told to stop."""

    url: str
    replies: list[tuple[int, httpx.Response]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.stop.is_set():
                which = len(self.replies) % len(PICTURES)
                body = {"input": data_uri(PICTURES[which])}
                self.replies.append((which, http.post("/v1/embeddings", json=body)))
                time.sleep(0.1)  # more would take the CPU from the replicas that start


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    for name, how in MODELS.items():
        save_tiny_artifact(root / name, **how)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def expected(artifacts: dict[str, Path]) -> dict[str, np.ndarray]:
    """What each model makes of the pictures, computed without a server."""
    return {
        name: np.stack([unit(direct_tokens(folder, one).mean(axis=0)) for one in PICTURES])
        for name, folder in artifacts.items()
    }


@pytest.fixture(scope="module")
def url(serve_url: str) -> Iterator[str]:
    from ray import serve as ray_serve

    from serve import app

    with pytest.MonkeyPatch.context() as patch:
        miss_killed_replicas_soon(patch, app)
        yield serve_url
        ray_serve.delete(APP)


def deploy(artifact: Path, placement: str) -> None:
    from ray import serve as ray_serve

    from serve import app
    from serve.embeddings.settings import ServeSettings

    chosen = {"artifact": str(artifact), "placement": placement, **PLACED[placement]}
    chosen |= {"num_replicas": 2, "threads": 1, "cpus": 0.1, "decode_processes": 0}
    # An application of its own for each placement: a change of placement is no update.
    name, prefix = f"{APP}-{placement}", f"/{placement}"
    ray_serve.run(app.build_app(ServeSettings(**chosen)), name=name, route_prefix=prefix)


def streamed(url: str) -> tuple[set[str], int]:
    """Streams frames until the server ends the stream.

    Returns:
        The models and errors that it named, and the close code.
    """
    told: set[str] = set()
    with connect(url.replace("http", "ws") + "/v1/streams", open_timeout=30) as socket:
        socket.send(json.dumps({"type": "start", "every": 1}))
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = json.loads(socket.recv(60))
                if message["type"] != "embedding":
                    told.add(message.get("model") or message["error"]["code"])
                time.sleep(0.1)
                # After the close nothing can be sent, but what came before it is still to be read.
                with contextlib.suppress(ConnectionClosed):
                    if message["type"] == "embedding":
                        socket.send(json.dumps({"type": "ack", "index": message["index"]}))
                    socket.send(PICTURES[0])
    return told, socket.close_code or 0


@pytest.mark.parametrize("placement", PLACED)
def test_no_request_fails_or_is_answered_by_two_models_during_an_update(
    placement: str, url: str, artifacts: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    from ray import serve as ray_serve

    url = f"{url}/{placement}"
    deploy(artifacts["wide"], placement)
    loads = [Load(url) for _ in range(2)]
    threads = [threading.Thread(target=load.run) for load in loads]
    streams: list[tuple[set[str], int]] = []
    threads.append(threading.Thread(target=lambda: streams.append(streamed(url))))
    for thread in threads:
        thread.start()
    wait_until(lambda: all(load.replies for load in loads))
    deploy(artifacts["tight"], placement)
    with httpx.Client(base_url=url, timeout=60) as http:
        after = [http.get("/v1/models").json()["data"][0] for _ in range(8)]
        health = [http.get("/healthz") for _ in range(8)]
        last = [
            http.post("/v1/embeddings", json={"input": data_uri(PICTURES[0]), "model": "tight"})
            for _ in range(8)
        ]
        old = http.post("/v1/embeddings", json={"input": data_uri(PICTURES[0]), "model": "wide"})
    for load in loads:
        load.stop.set()
    for thread in threads:
        thread.join(LIMIT_S)
    ray_serve.delete(f"{APP}-{placement}")

    replies = [reply for load in loads for reply in load.replies]
    assert {reply.status_code for _, reply in replies} == {200}
    seen: dict[str, set[str]] = {name: set() for name in MODELS}
    for which, reply in replies + [(0, reply) for reply in last]:
        body = reply.json()
        seen[body["model"]].add(body["fingerprint"])
        vector = np.array(body["data"][0]["embedding"])
        np.testing.assert_allclose(vector, expected[body["model"]][which], atol=1e-5)
    assert [len(fingerprints) for fingerprints in seen.values()] == [1, 1]
    assert seen["wide"] != seen["tight"]
    # They could be told apart.
    assert np.abs(expected["wide"] - expected["tight"]).max(axis=1).min() > 1e-2

    assert {(model["id"], model["image_size"]) for model in after} == {("tight", 64)}
    assert {model["fingerprint"] for model in after} == seen["tight"]
    assert {reply.text for reply in health} == {"ok"}
    assert {reply.json()["model"] for reply in last} == {"tight"}
    assert (old.status_code, old.json()["error"]["code"]) == (404, "model_not_found")
    ((told, close_code),) = streams
    assert close_code == 1012
    # Whichever comes first: its ingress is stopped, or the last embedder of its model.
    assert told in ({"wide", "model_changed"}, {"wide", "going_away"})
