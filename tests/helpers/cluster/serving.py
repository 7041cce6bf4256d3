"""The embeddings endpoint on the rig: its configuration, requests, and a client under load."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from helpers.cluster.data import picture
from helpers.repository import ROOT

PORT = 8000
PATIENCE_S = 60
"""Seconds a client waits for one answer."""
REQUEST = json.dumps({"input": base64.b64encode(picture(0, 0)).decode()}).encode()
AGAIN = (408, 429, 500, 502, 503, 504)
"""Answers after which a client sends the request again (docs/serving.md)."""


def serve_config(artifact: str, **arguments: Any) -> str:
    """serve/config.yaml for an artifact: two embedders, one a host, and two ingresses.

    The model has replicas of its own, which can be killed by themselves.
    """
    config = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    (application,) = config["applications"]
    placed = {"placement": "separate", "artifact": artifact, "model": "encoder"}
    application["args"] |= placed | arguments
    application["deployments"].append({"name": "Embedder"})
    for deployment in application["deployments"]:
        options = deployment.setdefault("ray_actor_options", {})
        options["num_cpus"] = min(options.get("num_cpus", 0.5), 0.5)
        if deployment["name"] in ("Ingress", "Embedder"):
            deployment.pop("autoscaling_config", None)
            one_a_host = {"max_replicas_per_node": 1, "max_surge_percent": 0}
            deployment |= {"num_replicas": 2} | one_a_host
    return yaml.safe_dump(config)


def write_serve_config(path: Path, artifact: str, **arguments: Any) -> Path:
    path.write_text(serve_config(artifact, **arguments))
    return path


def url_of(address: str) -> str:
    return f"http://{address}:{PORT}"


def embed(url: str) -> dict[str, Any]:
    """Sends one request; returns the reply."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/embeddings", REQUEST, headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        reply: dict[str, Any] = json.load(response)
    return reply


@dataclasses.dataclass
class Load:
    """Requests at a steady rate, to several proxies in turn, as a client behind a balancer.

    A request that fails in a way that docs/serving.md calls repeatable is sent again, to the next
    proxy, at most `retries` times.
    """

    urls: Sequence[str]
    rate: float = 4.0
    retries: int = 3
    sent: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)
    """First tries that failed, by what the client saw."""
    failed: list[str] = dataclasses.field(default_factory=list)
    """Requests that failed with all of their retries."""
    replies: list[tuple[float, float, dict[str, Any]]] = dataclasses.field(default_factory=list)
    """Time of sending, seconds until the answer, and the answer."""

    def __post_init__(self) -> None:
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._clients: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._send_all, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for client in self._clients:
            client.join()

    def _send_all(self) -> None:
        while not self._end.wait(1 / self.rate):
            client = threading.Thread(target=self._send, args=(self.sent,), daemon=True)
            self.sent += 1
            self._clients.append(client)
            client.start()

    def _send(self, number: int) -> None:
        started = time.time()
        problem = ""
        for attempt in range(1 + self.retries):
            try:
                reply = embed(self.urls[(number + attempt) % len(self.urls)])
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read()[:80]!r}"
                again = error.code in AGAIN
            except OSError as error:
                problem, again = f"{type(error).__name__} {error}", True
            else:
                with self._lock:
                    self.replies.append((started, time.time() - started, reply))
                return
            with self._lock:
                if attempt == 0:
                    self.refused.append(f"{self.urls[number % len(self.urls)]} {problem}")
            if not again:
                break
            time.sleep(0.5 * 2**attempt)
        with self._lock:
            self.failed.append(problem)

    def slowest(self) -> float:
        return max((seconds for _, seconds, _ in self.replies), default=0.0)
