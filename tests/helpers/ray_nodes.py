"""Nodes of a Ray cluster as processes of this host, which can be killed as a whole, and Redis.

Ports, folder and environment are their own, so that no other Ray on the host is touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.repository import ROOT
from helpers.serve.free_ports import free_ports

BIN = Path(sys.executable).parent
PASSWORD = "not-a-secret"
START_S = 90.0


class RayNodes:
    """A head without CPUs and workers, with the settings of deploy/own_machines/ray.env.

    Args:
        redis: Whether the head keeps its state in a Redis.
    """

    def __init__(self, *, redis: bool) -> None:
        self.gcs, self._dashboard, self._client, self._redis, self.http = free_ports(5)
        self.folder = Path(f"/tmp/rn{self.gcs}")  # its sockets' paths may have 107 characters
        self.folder.mkdir()
        self.dashboard = f"http://127.0.0.1:{self._dashboard}"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env |= shipped() | {
            "RAY_AUTH_MODE": "disabled",  # nothing but this host reaches it
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs}",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
        }
        self._head_env = dict(self.env)
        self.head: subprocess.Popen[bytes]
        self.worker: subprocess.Popen[bytes]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._options: list[str] = []
        if redis:
            self._options = [f"--redis-password={PASSWORD}"]
            self._head_env |= {"RAY_REDIS_ADDRESS": f"127.0.0.1:{self._redis}"}
            command = ["redis-server", "--port", str(self._redis), "--bind", "127.0.0.1"]
            command += ["--requirepass", PASSWORD, "--dir", str(self.folder)]
            self._start("redis", [*command, "--appendonly", "yes"], self.env)

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_head(self) -> subprocess.Popen[bytes]:
        return self._start_node(
            "head",
            *("--head", f"--port={self.gcs}", f"--dashboard-port={self._dashboard}"),
            *("--num-cpus=0", f"--ray-client-server-port={self._client}"),
            *(f"--temp-dir={self.folder}/ray", *self._options),
            env=self._head_env,
        )

    def start_worker(self, cpus: int = 4) -> subprocess.Popen[bytes]:
        arguments = (f"--address=127.0.0.1:{self.gcs}", f"--num-cpus={cpus}")
        return self._start_node(f"worker{len(self._processes)}", *arguments, env=self.env)

    def _start_node(
        self, name: str, *arguments: str, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        # Namespaces end with all processes in them. And `ray start --head` does not start where it
        # sees processes of a worker of its own address, which on machines of their own it cannot.
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
        command += [str(BIN / "ray"), "start", *arguments]
        agent, grpc, metrics = free_ports(3)
        more = [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
        more += [f"--metrics-export-port={metrics}", "--object-store-memory=100000000"]
        return self._start(name, [*command, *more, "--block", "--disable-usage-stats"], env)

    def _start(self, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / f"{name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def run(self, *command: str) -> str:
        """Runs a command of Ray against this cluster; returns what it printed."""
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def alive(self) -> int:
        """Returns how many nodes are alive; 0 without a head."""
        try:
            with urllib.request.urlopen(f"{self.dashboard}/nodes?view=summary", timeout=5) as reply:
                nodes: list[dict[str, Any]] = json.load(reply)["data"]["summary"]
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def answer(self) -> str | None:
        """Returns what the Serve application answers; None if the request fails."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/", timeout=10) as reply:
                return str(reply.read().decode())
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.log"))


def shipped() -> dict[str, str]:
    """Returns Ray's settings that machines of one's own have."""
    text = (ROOT / "deploy/own_machines/ray.env").read_text()
    return dict(re.findall(r"^(RAY_\w+)=(.*)$", text, re.M))


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = START_S) -> float:
    """Waits until something holds; returns after how many seconds it did."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > limit_s:
            raise TimeoutError(f"no {what} within {limit_s:.0f} s")
        time.sleep(0.5)
    return time.monotonic() - started


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a node and all that it started, as when a machine loses its power; or Redis."""
    process.kill()
    process.wait()


def terminate(node: subprocess.Popen[bytes]) -> None:
    """Tells `ray start` of a node to end, as systemd and Kubernetes do."""
    (child,) = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
