"""Training on a cluster: two nodes on this host, a job by `ray job submit`, everything on S3.

Two `ray start` nodes with ports, folder and token of their own, so that no other Ray on the host is
touched, and moto's HTTP server as S3. The commands are those of docs/cluster.md.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

from helpers.own_ray import without_ray
from helpers.pipelines.ingestion import run_backwards
from helpers.repository import ROOT
from helpers.serve.free_ports import free_ports
from models.artifacts.artifact import load_artifact
from pipelines import ingest as ingest_module
from pipelines.config.ingest import IngestConfig
from pipelines.config.jobs import ExportConfig
from pipelines.dataset.shards import read_manifest, verify_shards
from pipelines.export import export
from pipelines.ingest import ingest
from pipelines.ingestion.staging import STAGING

BUCKET = "rayjepa-cluster-test"
START_S = 120
JOB_S = 400


def bucket() -> Any:
    """The file system of the S3 that the environment names, nothing cached."""
    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)


@dataclasses.dataclass
class LocalCluster:
    """Nodes of three (logical) CPUs each on this host, and how to reach them."""

    folder: Path
    env: dict[str, str]
    dashboard: str
    token: str
    nodes: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)

    def start_node(self, *arguments: str) -> None:
        agent, grpc, metrics = free_ports(3)
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", *arguments, "--block"),
            *("--num-cpus=3", "--object-store-memory=150000000", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--metrics-export-port={metrics}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
        ]
        log = (self.folder / f"node{len(self.nodes)}.log").open("wb")
        self.nodes.append(
            subprocess.Popen(
                command,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def get(self, path: str, token: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=5) as response:
            return json.load(response)

    def wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert all(node.poll() is None for node in self.nodes), self.logs()
            try:
                nodes = self.get("/nodes?view=summary", self.token)["data"]["summary"]
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                nodes = []
            if sum(n["raylet"].get("state") == "ALIVE" for n in nodes) == count:
                return
            time.sleep(0.3)
        raise TimeoutError(f"no {count} nodes within {START_S} s: {self.logs()}")

    def submit(self, *entrypoint: str, cwd: Path = ROOT) -> str:
        """Returns what the job printed; it must succeed."""
        command = [
            *(str(Path(sys.executable).parent / "ray"), "job", "submit"),
            *("--address", self.dashboard, "--working-dir", ".", "--", *entrypoint),
        ]
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.env,
            timeout=JOB_S,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout

    def logs(self) -> str:
        return "\n".join(p.read_text()[-2000:] for p in sorted(self.folder.glob("node*.log")))

    def stop(self) -> None:
        for node in reversed(self.nodes):  # the head last: a node takes long to leave without it
            node.send_signal(signal.SIGTERM)
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Endpoint of an S3 with one empty bucket; this process's environment leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = f"http://127.0.0.1:{server._server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket().mkdir(BUCKET)
        yield endpoint
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes with token authentication on."""
    folder = tmp_path_factory.mktemp("cluster")
    token = secrets.token_hex(32)
    (folder / "auth_token").write_text(token)
    gcs, dashboard, client = free_ports(3)
    env = without_ray()
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        # What asks for "the" Ray of this host gets this one, whatever else runs here.
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        # Nodes that are told to end wait this long for actors that outlive their job.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    # Not pytest's: its sockets' paths may have 107 characters. One for each node, as on two hosts:
    # a node unpacks a job's code anew, and takes it away from one that runs it already.
    ray_folders = [Path(f"/tmp/rj{gcs}-{number}") for number in range(2)]
    local = LocalCluster(folder, env, f"http://127.0.0.1:{dashboard}", token)
    try:
        local.start_node(
            *("--head", f"--port={gcs}", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={ray_folders[0]}"),
        )
        local.wait_for_nodes(1)
        local.start_node(f"--address=127.0.0.1:{gcs}", f"--temp-dir={ray_folders[1]}")
        local.wait_for_nodes(2)
        yield local
    finally:
        local.stop()
        for ray_folder in ray_folders:
            shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.xdist_group("programs")
def test_the_job_server_asks_for_the_token(cluster: LocalCluster) -> None:
    for token in (None, "f" * 64):
        with pytest.raises(urllib.error.HTTPError) as refused:
            cluster.get("/api/jobs/", token)
        assert refused.value.code in (401, 403)
    assert cluster.get("/api/jobs/", cluster.token) == []


@pytest.mark.ray
@pytest.mark.xdist_group("programs")
def test_a_command_with_another_token_is_told_so(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ("--source", str(tmp_path), "--out", str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.ingest", *arguments],
        cwd=ROOT,
        env=cluster.env | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert told[0] == "error: the Ray cluster refuses the token of this process, or got none"
    assert len(told) == 2
    assert "RAY_AUTH_TOKEN" in told[1]


@pytest.fixture(scope="module")
def shards(s3: str, cifar_sample: Path) -> str:
    """URI of 320 images, ingested from a WebDataset tar on S3; by a job in `tests/cluster`."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for folder in sorted((cifar_sample / "train").iterdir()):
            for path in sorted(folder.glob("*.png"))[:32]:
                archive.add(path, arcname=f"{folder.name}_{path.name}")
    bucket().pipe(f"{BUCKET}/raw/sample.tar", tar.getvalue())
    uri = f"s3://{BUCKET}/shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_module, "_run", run_backwards)
        patch.setattr(ingest_module.ray, "is_initialized", lambda: True)
        ingest(IngestConfig(source=f"s3://{BUCKET}/raw", out=uri, row_group_rows=32))
    assert verify_shards(uri).num_samples == 320
    assert not bucket().exists(f"{BUCKET}/shards/{STAGING}")
    return uri


def pretrain(cluster: LocalCluster, shards: str) -> str:
    return cluster.submit(
        *("python", "pipelines/pretrain.py", "debug", "--data.train", shards),
        # Two CPUs of a node's three: one worker a node, and one CPU left for its data tasks.
        *("--run.storage", f"s3://{BUCKET}/runs", "--run.workers", "2"),
        *("--run.cpus-per-worker", "2", "--run.threads", "1", "--run.log-samples"),
    )


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bucket().cat(f"{BUCKET}/{path}").splitlines()]


def samples_by_rank() -> dict[int, list[str]]:
    """Sample ids that each worker trained on."""
    found: dict[int, list[str]] = {}
    for path in bucket().glob(f"{BUCKET}/runs/debug/samples-rank*.jsonl"):
        for line in lines_of(path.removeprefix(f"{BUCKET}/")):
            found.setdefault(line["rank"], []).extend(line["ids"])
    return found


def nodes_of_workers(cluster: LocalCluster) -> set[str]:
    actors = cluster.get("/logical/actors", cluster.token)["data"]["actors"].values()
    workers = [a for a in actors if "RayTrainWorker" in a["actorClass"]]
    return {a["address"]["nodeId"] for a in workers}


@pytest.mark.ray
@pytest.mark.xdist_group("programs")
def test_pretrain_by_a_job(cluster: LocalCluster, shards: str) -> None:
    """Resuming on S3 has its tests in test_pretrain.py."""
    run = f"s3://{BUCKET}/runs/debug"
    printed = pretrain(cluster, shards)
    assert f"run {run} at step 10" in printed
    assert len(nodes_of_workers(cluster)) == 2
    assert [r["step"] for r in lines_of("runs/debug/metrics.jsonl")] == [2, 4, 6, 8, 10]
    state = json.loads(bucket().cat(f"{BUCKET}/runs/debug/checkpoint_00000010/state.json"))
    assert (state["step"], state["world_size"]) == (10, 2)
    assert state["manifest_hash"] == read_manifest(shards).manifest_hash

    # 320 images at 32 a step: the ten steps are one epoch, of which both nodes together saw every
    # image once.
    by_rank = samples_by_rank()
    assert {rank: len(ids) for rank, ids in by_rank.items()} == {0: 160, 1: 160}
    assert len({*by_rank[0], *by_rank[1]}) == 320

    # What the cluster left on S3 is all that another machine needs.
    artifact = load_artifact(export(ExportConfig(checkpoint=run, out=f"s3://{BUCKET}/artifact")))
    assert (artifact.provenance["run"], artifact.provenance["step"]) == ("debug", 10)
    assert all(torch.isfinite(p).all() for p in artifact.encoder.parameters())
