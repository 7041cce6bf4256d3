"""The two commands of docs/serving.md, as a shell runs them, on one Ray of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from helpers.own_ray import python_path, without_ray
from helpers.repository import ROOT
from helpers.serve.embeddings import WIDTH, png_uri, save_tiny_artifact
from helpers.serve.free_ports import free_ports

BIN = Path(sys.executable).parent
START_S = 240  # of a node or a replica on a busy machine; seconds on an idle one

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("programs")]


def wait_for_dashboard(url: str, token: str, node: subprocess.Popen[bytes]) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert node.poll() is None, "the node ended"
        try:
            if httpx.get(f"{url}/api/version", headers=headers, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"no dashboard within {START_S} s")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a shell on the only node of a Ray cluster."""
    gcs, dashboard, client, agent, grpc, metrics = free_ports(6)
    env = without_ray()
    token = tmp_path_factory.mktemp("ray") / "auth_token"
    token.write_text(secrets.token_hex(32))
    env |= {"PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    folder = Path(f"/tmp/rs{gcs}")  # its sockets' paths may have 107 characters: not pytest's
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4"),
        *("--object-store-memory=150000000", "--disable-usage-stats", f"--temp-dir={folder}"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
    ]
    log = token.with_name("log").open("wb")
    node = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_dashboard(url, token.read_text(), node)
        yield env | {"RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_DASHBOARD_ADDRESS": url}
    finally:
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    save_tiny_artifact(folder)
    return folder


def wait_for_model(
    url: str, model: str, process: subprocess.Popen[bytes] | None, log: Path
) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{url}/v1/models", timeout=5).json()["data"][0]["id"] == model:
                return
        except (httpx.HTTPError, ValueError, LookupError):
            pass  # the proxy's own replies while there is no replica are not ours
        time.sleep(0.3)
    raise TimeoutError(f"{url} does not serve {model}: {log.read_text()[-3000:]}")


def ask(url: str) -> list[float]:
    reply = httpx.post(f"{url}/v1/embeddings", json={"input": png_uri(3)}, timeout=60)
    assert reply.status_code == 200, reply.text
    vector: list[float] = reply.json()["data"][0]["embedding"]
    assert len(vector) == WIDTH
    return vector


def test_serve_deploy_with_the_shipped_config_then_serve_run(
    environment: dict[str, str], artifact: Path, tmp_path: Path
) -> None:
    # The port is the only other line that changes: 8000 may be taken here.
    (port,) = free_ports(1)
    shipped = (ROOT / "serve" / "config.yaml").read_text()
    edited = shipped.replace("demo-out/encoder", str(artifact)).replace("8000", str(port), 1)
    assert yaml.safe_load(edited)["applications"][0]["args"]["artifact"] == str(artifact)
    (tmp_path / "config.yaml").write_text(edited)
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    serve = str(BIN / "serve")
    with log.open("wb") as file:
        shell = {"env": environment, "cwd": ROOT, "stdout": file, "stderr": file}
        deploy = [serve, "deploy", str(tmp_path / "config.yaml")]
        done = subprocess.run(deploy, **shell, check=False)
        assert done.returncode == 0, log.read_text()[-3000:]
        wait_for_model(url, "tiny", None, log)

        # Beside what was deployed, whose proxy has a free port: alone it would take 8000.
        run = [serve, "run", "serve.app:build_app", f"artifact={artifact}", "model=second"]
        process = subprocess.Popen([*run, "--name", "two", "--route-prefix", "/two"], **shell)
        try:
            wait_for_model(f"{url}/two", "second", process, log)
            assert ask(f"{url}/two") == pytest.approx(ask(url), abs=1e-6)
        finally:
            process.send_signal(signal.SIGINT)  # Ctrl-C
            process.wait(60)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/v1/models", timeout=5).raise_for_status()
