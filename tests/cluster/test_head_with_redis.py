"""A head that keeps its state in Redis is killed, and a worker is told to end, under load.

The nodes are processes of this host, not hosts of the rig.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator

import pytest

from helpers.ray_nodes import RayNodes, kill, shipped, terminate, wait_until

OUTAGE_S = 10.0
CLIENTS = 3
missing = next((name for name in ("redis-server", "unshare") if shutil.which(name) is None), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing is not None, reason=f"{missing} is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root"),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A head with Redis, a worker, and Serve's two replicas on it."""
    with RayNodes(redis=True) as made:
        made.head = made.start_head()
        wait_until(lambda: made.alive() == 1, "head")
        made.worker = made.start_worker()
        wait_until(lambda: made.alive() == 2, "worker")
        deploy(made)
        wait_until(lambda: made.answer() is not None, "answer")
        yield made


def test_serve_answers_without_the_head_and_needs_no_deploy_after_it(nodes: RayNodes) -> None:
    replicas = replicas_of(nodes)
    with asked(nodes) as answers:
        kill(nodes.head)
        time.sleep(OUTAGE_S)
        nodes.head = nodes.start_head()
        wait_until(lambda: nodes.alive() == 2, "worker at the new head")
        wait_until(lambda: "RUNNING" in status(nodes), "application")
    assert nodes.worker.poll() is None  # it has waited for the head, and not started anew
    assert answers.count(None) <= 2 * CLIENTS  # those that were inside the head's own proxy
    assert len(answers) > OUTAGE_S * CLIENTS
    assert replicas_of(nodes) == replicas  # the same processes


def test_a_worker_that_is_told_to_end_does_so_after_its_requests(nodes: RayNodes) -> None:
    """Serve moves its replicas to the other worker first; no request fails."""
    replicas = replicas_of(nodes)
    nodes.start_worker()
    wait_until(lambda: nodes.alive() == 3, "second worker")
    with asked(nodes) as answers:
        terminate(nodes.worker)
        seconds = wait_until(lambda: nodes.worker.poll() is not None, "end of the worker")
        time.sleep(3)
    assert seconds < float(shipped()["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert answers.count(None) == 0
    assert not replicas & replicas_of(nodes)


def replicas_of(nodes: RayNodes) -> set[str]:
    with asked(nodes) as answers:
        time.sleep(4)
    found = {answer for answer in answers if answer}
    assert len(found) == 2
    return found


def deploy(nodes: RayNodes) -> None:
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": nodes.http},
        "applications": [
            {"name": "a", "route_prefix": "/", "import_path": "helpers.serve.answering:app"}
        ],
    }
    path = nodes.folder / "serve.json"
    path.write_text(json.dumps(config))
    nodes.run("serve", "deploy", "-a", nodes.dashboard, str(path))


def status(nodes: RayNodes) -> str:
    return nodes.run("serve", "status", "-a", nodes.dashboard)


@contextlib.contextmanager
def asked(nodes: RayNodes) -> Iterator[list[str | None]]:
    """Sends requests, one after the other by each of some clients; yields the answers."""
    over, answers = threading.Event(), list[str | None]()

    def ask() -> None:
        while not over.is_set():
            answers.append(nodes.answer())

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()
