"""A Ray cluster on the rig, as its user starts it: `ray up` with deploy/own_machines/cluster.yaml.

The commands are those of docs/cluster.md. Only what a rig must differ in is changed in the file:
addresses, user and key; no `pip install`, because the hosts share this Python; small nodes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from helpers.cluster.hosts import CODE
from helpers.cluster.jobs import Job
from helpers.cluster.rig import ADDRESSES, Rig
from helpers.repository import ROOT
from helpers.serve.free_ports import free_ports

NAME = "rayjepa-rig"
UP_S, JOIN_S, JOB_S, STOP_S = 240, 180, 400, 90
WORKER_CPUS = 3


def rig_config(rig: Rig, env: dict[str, str]) -> dict[str, Any]:
    """Returns the project's cluster.yaml for machines of one's own, for these hosts."""
    text = (ROOT / "deploy/own_machines/cluster.yaml").read_text()
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
    text = text.replace("ulimit -n 65536;", f"{exports}ulimit -n 65536;")
    text = text.replace("~/rayjepa", CODE)
    config: dict[str, Any] = yaml.safe_load(text)
    head, *workers = ADDRESSES.values()
    config["cluster_name"] = NAME
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(rig.key)}
    config["setup_commands"] = [c for c in config["setup_commands"] if "venv" not in c]
    small = " --object-store-memory=150000000"
    config["head_start_ray_commands"][-1] += small
    config["worker_start_ray_commands"][-1] += f"{small} --num-cpus={WORKER_CPUS}"
    return config


@dataclasses.dataclass
class RigCluster:
    """The cluster, seen from the user's laptop."""

    rig: Rig
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """Environment of the user's commands."""
    more: dict[str, str] = dataclasses.field(default_factory=dict)
    """Environment of `ray start` on all hosts, beside the storage's."""
    say: Callable[[str], None] = lambda _: None
    """Takes the commands and what they print, for a transcript."""
    _tunnel: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        (port,) = free_ports(1)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
        self.env = kept | {
            "HOME": str(self.rig.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": f"http://localhost:{port}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
        }

    @property
    def dashboard(self) -> str:
        return self.env["RAY_API_SERVER_ADDRESS"]

    @property
    def config(self) -> Path:
        return self.rig.folder / "cluster.yaml"

    def laptop(self, *command: str, timeout: float = JOB_S, check: bool = True) -> str:
        """Runs a command of the user, in the checkout; returns what it prints."""
        self.say("$ " + shlex.join(command))
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.env,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.say(done.stdout)
        assert not check or done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    def up(self) -> None:
        """`ray up`, the tunnel, and all three nodes."""
        if not (self.rig.home / ".ray/auth_token").exists():
            self.laptop("ray", "get-auth-token", "--generate")
        env = self.rig.s3.env | {"PYTHONPATH": CODE, "OMP_NUM_THREADS": "1"} | self.more
        self.config.write_text(yaml.safe_dump(rig_config(self.rig, env)))
        self.laptop("ray", "up", "-y", str(self.config), timeout=UP_S)
        self.tunnel()
        self.wait_for_nodes(len(self.rig.hosts))

    def tunnel(self) -> None:
        """What `ray dashboard` does: the head's port 8265 on the laptop."""
        self.close_tunnel()
        ssh = ["ssh", "-q", "-N", "-i", str(self.rig.key), "-o", "StrictHostKeyChecking=no"]
        ssh += ["-o", "UserKnownHostsFile=/dev/null", "-o", "ExitOnForwardFailure=yes"]
        port = self.dashboard.rpartition(":")[2]
        ssh += ["-L", f"{port}:localhost:8265", f"root@{ADDRESSES['head']}"]
        self._tunnel = subprocess.Popen(ssh, stdin=subprocess.DEVNULL)

    def close_tunnel(self) -> None:
        if self._tunnel is not None:
            self._tunnel.kill()
            self._tunnel.wait()

    def get(self, path: str) -> Any:
        """Asks the dashboard, as the user's commands do."""
        token = (self.rig.home / ".ray/auth_token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def nodes(self) -> list[str]:
        """Addresses of the nodes that are alive; none while the head does not answer."""
        try:
            summary = self.get("/nodes?view=summary")["data"]["summary"]
        except (urllib.error.URLError, OSError, ValueError):
            return []
        raylets = [node["raylet"] for node in summary]
        return [r["nodeManagerAddress"] for r in raylets if r.get("state") == "ALIVE"]

    def wait_for_nodes(self, count: int, within_s: float = JOIN_S) -> float:
        """Waits until so many nodes are alive; returns the seconds."""
        started = time.monotonic()
        while time.monotonic() - started < within_s:
            if len(self.nodes()) == count:
                return time.monotonic() - started
            time.sleep(1)
        raise TimeoutError(f"{self.nodes()} are alive after {within_s} s, wanted {count}")

    def job(self, *entrypoint: str) -> str:
        """`ray job submit`; waits, and returns what the job printed."""
        return self.laptop("ray", "job", "submit", "--working-dir", ".", "--", *entrypoint)

    def start_job(self, name: str, *entrypoint: str) -> Job:
        """`ray job submit --no-wait`; returns at once."""
        submit = ("ray", "job", "submit", "--no-wait", "--submission-id", name)
        self.laptop(*submit, "--working-dir", ".", "--", *entrypoint)
        return Job(name, self.rig["head"].root / "tmp/ray", self.get)

    def stop_job(self, job: Job) -> float:
        """`ray job stop`; returns the seconds until it has stopped."""
        started = time.monotonic()
        self.laptop("ray", "job", "stop", job.name)
        job.wait_for_end(STOP_S)
        return time.monotonic() - started

    def serve_deploy(self, config: Path) -> float:
        """`serve deploy`; returns the seconds until all applications run."""
        started = time.monotonic()
        self.laptop("serve", "deploy", "-a", self.dashboard, str(config))
        while time.monotonic() - started < JOB_S:
            applications = self.get("/api/serve/applications/")["applications"].values()
            states = {application["status"] for application in applications}
            assert "DEPLOY_FAILED" not in states, applications
            if states == {"RUNNING"}:
                return time.monotonic() - started
            time.sleep(1)
        raise TimeoutError(f"{states} after {JOB_S} s")

    def start_ray(self, host: str) -> None:
        """What docs/cluster.md says of a machine without systemd: `ray start` by hand."""
        config = yaml.safe_load(self.config.read_text())
        kind = "head" if host == "head" else "worker"
        for command in config[f"{kind}_start_ray_commands"]:
            line = f"export RAY_HEAD_IP={ADDRESSES['head']}; {command}"
            self.rig[host].run("bash", "-c", line, timeout=120)

    def down(self) -> None:
        """`ray down`; every Ray process on every host is gone then."""
        self.laptop("ray", "down", "-y", str(self.config), timeout=UP_S)
        self.close_tunnel()

    def processes(self) -> dict[str, list[str]]:
        """Ray's processes by host."""
        return {
            name: list(host.processes(r"raylet|gcs_server|ray::").values())
            for name, host in self.rig.hosts.items()
            if host.pid is not None
        }
