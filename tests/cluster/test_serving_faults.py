"""Requests go on while replicas, hosts and proxies are lost and while the model is replaced.

The client tries again as docs/serving.md asks, at another proxy. No request may fail for good.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.cluster.cluster import RigCluster
from helpers.cluster.data import upload_artifact
from helpers.cluster.report import Row, record
from helpers.cluster.rig import ADDRESSES
from helpers.cluster.serving import Load, embed, url_of, write_serve_config

pytestmark = pytest.mark.slow

WORKERS = [url_of(ADDRESSES[name]) for name in ("w1", "w2")]
ALL = [url_of(address) for address in ADDRESSES.values()]


@pytest.fixture(scope="module")
def served(cluster: RigCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Fingerprint of the model that two embedders and two ingresses serve, one of each a host."""
    config = tmp_path_factory.mktemp("serve") / "serve.yaml"
    write_serve_config(config, upload_artifact(cluster.rig.s3, "artifacts/first"))
    cluster.serve_deploy(config)
    yield embed(WORKERS[0])["fingerprint"]
    cluster.laptop("serve", "shutdown", "-y", "-a", cluster.dashboard)


def report(number: str, fault: str, happened: str, load: Load, test: str) -> None:
    again, failed = len(load.refused), len(load.failed)
    row = Row(
        number=number,
        fault=fault,
        happened=happened,
        lost=f"{again} of {load.sent} requests needed a second try, {failed} failed",
        recovery_s=load.slowest(),
        message=load.refused[0] if load.refused else "",
        test=test,
    )
    record(row)
    assert load.failed == []
    assert load.sent > 20


def test_an_embedder_is_killed(cluster: RigCluster, served: str) -> None:
    with Load(ALL) as load:
        time.sleep(3)
        cluster.rig["w1"].signal(r"^ray::ServeReplica:embeddings:Embedder")
        time.sleep(20)
    happened = "the ingress asks the other one; the replica starts again"
    report("12a", "embedder replica SIGKILL", happened, load, "test_an_embedder_is_killed")
    assert {reply["fingerprint"] for _, _, reply in load.replies} == {served}


def test_a_proxy_is_killed(cluster: RigCluster, served: str) -> None:
    with Load(ALL) as load:
        time.sleep(3)
        cluster.rig["head"].signal(r"^ray::ProxyActor")
        time.sleep(40)
    happened = "connections to that host are refused until Serve starts it again"
    report("12d", "the head's proxy SIGKILL", happened, load, "test_a_proxy_is_killed")


def test_the_model_is_replaced_under_load(cluster: RigCluster, served: str, tmp_path: Path) -> None:
    """By one of another image size, which old ingresses would prepare wrongly."""
    uri = upload_artifact(cluster.rig.s3, "artifacts/second", size=64)
    config = write_serve_config(tmp_path / "serve.yaml", uri)
    with Load(ALL) as load:
        time.sleep(3)
        cluster.serve_deploy(config)
        time.sleep(5)
    happened = "replicas are replaced one after the other"
    name = "test_the_model_is_replaced_under_load"
    report("12c", "serve deploy of another artifact", happened, load, name)
    of_model: dict[str, set[str]] = {}
    for _, _, reply in load.replies:
        vector = [round(value, 4) for value in reply["data"][0]["embedding"]]
        of_model.setdefault(reply["fingerprint"], set()).add(str(vector))
    assert len(of_model) == 2
    assert all(len(vectors) == 1 for vectors in of_model.values()), "answers mix two models"


def test_a_host_with_replicas_is_lost(cluster: RigCluster, served: str) -> None:
    """The client goes through the proxies of the two hosts that are left."""
    left = [url_of(ADDRESSES[name]) for name in ("head", "w1")]
    with Load(left) as load:
        time.sleep(3)
        cluster.rig["w2"].power_off()
        time.sleep(30)
        cluster.rig["w2"].power_on()
        cluster.wait_for_nodes(3)
    happened = "another embedder is asked after 15 s; the head starts Ray there again"
    report(
        "12b",
        "a host with replicas loses power",
        happened,
        load,
        "test_a_host_with_replicas_is_lost",
    )
