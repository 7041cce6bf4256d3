"""A host: namespaces of its own for network, processes, mounts and name; an sshd; a disk.

Its root is an overlay of this machine's, whose upper layer is a small file system of its own, a
disk that can be filled. `ray stop` and signals reach its own processes alone, and SIGKILL to its
PID 1 is a power cut: everything on it is gone but the disk.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from helpers.cluster import network
from helpers.cluster.network import run
from helpers.repository import ROOT

BOOT = Path(__file__).with_name("boot.sh")
BOOT_S = 30
HOME = "/root"
"""Home folder of the only user of a host; boot.sh fills it."""
CODE = f"{HOME}/rayjepa"
NOTHING: Mapping[str, str] = {}
NO_CACHES = shutil.ignore_patterns("__pycache__")
DISK = "4G"
"""Sparse: what the host does not write takes no room."""


@dataclasses.dataclass
class Host:
    """One host of the rig, off at first."""

    name: str
    address: str
    rig: Path
    """Folder of the rig, with `key` and `hosts`."""
    pid: int | None = None
    """PID 1 of the host, as this machine counts; None while it is off."""
    _shell: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return self.rig / self.name

    @property
    def root(self) -> Path:
        """The host's files, seen from this machine, while it is on."""
        return Path(f"/proc/{self.pid}/root")

    def create(self) -> None:
        """Makes disk and cable."""
        for name in ("disk", "root"):
            (self.folder / name).mkdir(parents=True)
        image = self.folder / "disk.img"
        run("truncate", "-s", DISK, str(image))
        run("mkfs.ext4", "-q", str(image))
        network.add_cable(self.name, self.address)

    def power_on(self) -> None:
        """Boots, and waits for its sshd. The disk is as it was."""
        network.plug(self.name)
        # The host ends with this process, also when that is killed.
        command = ["setpriv", "--pdeathsig", "KILL"]
        command += ["ip", "netns", "exec", network.namespace(self.name)]
        command += ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        command += ["bash", str(BOOT), self.name, str(self.folder), sys.prefix]
        with (self.folder / "boot.log").open("wb") as log:
            self._shell = subprocess.Popen(
                [*command, str(self.rig / "hosts")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and self._shell.poll() is None:
            children = run("pgrep", "-P", str(self._shell.pid), check=False).split()
            if children and _listens(self.address):
                self.pid = int(children[0])
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} did not boot: {(self.folder / 'boot.log').read_text()}")

    def power_off(self) -> None:
        """A power cut."""
        if self.pid is not None:
            network.run("ip", "link", "set", f"v-{self.name}", "down", check=False)
            os.kill(self.pid, signal.SIGKILL)
            self.pid = None
        if self._shell is not None:
            self._shell.wait()

    def remove(self) -> None:
        """Ends everything on the host and takes it down."""
        self.power_off()
        network.remove_cable(self.name)

    def _entered(self, command: tuple[str, ...], env: Mapping[str, str]) -> list[str]:
        enter = ["nsenter", "-t", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid"]
        path = f"PATH={HOME}/venv/bin:{os.environ['PATH']}"
        settings = [f"{name}={value}" for name, value in env.items()]
        return [
            *enter,
            "--root",
            "env",
            "-i",
            "-C",
            HOME,
            f"HOME={HOME}",
            path,
            *settings,
            *command,
        ]

    def run(self, *command: str, env: Mapping[str, str] = NOTHING, timeout: float = 60) -> str:
        """Returns what a command prints on the host; it must succeed."""
        done = subprocess.run(
            self._entered(command, env),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def start(self, *command: str, env: Mapping[str, str] = NOTHING) -> subprocess.Popen[str]:
        """Starts a command on the host, which ends when the returned process is killed."""
        command = ("setpriv", "--pdeathsig", "KILL", *command)
        return subprocess.Popen(
            self._entered(command, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def install(self, *packages: str) -> None:
        """Copies packages of the checkout to `CODE`, as `ray up` does."""
        for package in packages:
            to = self.root / CODE.lstrip("/") / package
            shutil.copytree(ROOT / package, to, dirs_exist_ok=True, ignore=NO_CACHES)

    def processes(self, pattern: str) -> dict[int, str]:
        """Returns command lines of the host's processes that match, by this machine's PID."""
        found = {}
        for pid in run("ip", "netns", "pids", network.namespace(self.name)).split():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            title = line.replace(b"\0", b" ").decode(errors="replace").strip()
            if re.search(pattern, title):
                found[int(pid)] = title
        return found

    def signal(self, pattern: str, number: int = signal.SIGKILL) -> list[int]:
        """Sends a signal to the processes that match; returns them, at least one."""
        found = list(self.processes(pattern))
        assert found, f"{self.name} has no process {pattern!r}"
        for pid in found:
            os.kill(pid, number)
        return found

    def fill(self, folder: str) -> None:
        """Fills the file system of a folder to the last block."""
        try:
            self.run("dd", "if=/dev/zero", f"of={folder}/ballast", "bs=1M", timeout=120)
        except RuntimeError as error:
            if "No space left" not in str(error):
                raise

    def free(self, folder: str) -> None:
        """Gives back what `fill` took."""
        self.run("rm", "-f", f"{folder}/ballast")


def _listens(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=0.5):
            return True
    except OSError:
        return False
