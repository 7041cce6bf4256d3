"""The rig: a head, two workers and S3, made and taken down as one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from helpers.cluster import network
from helpers.cluster.hosts import Host
from helpers.cluster.s3 import RigS3

ADDRESSES = {"head": "10.77.0.10", "w1": "10.77.0.11", "w2": "10.77.0.12"}
PROGRAMS = (
    "ip",
    "ethtool",
    "ssh",
    "ssh-keygen",
    "rsync",
    "mkfs.ext4",
    "nsenter",
    "unshare",
    "setpriv",
)
SSHD = "/usr/sbin/sshd"


def missing() -> str | None:
    """Says why this machine cannot have a rig; None if it can."""
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "making hosts out of namespaces needs root"
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    lacking += [] if Path(SSHD).exists() else ["sshd"]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    if not (Path("/dev/net/tun").exists() and Path("/dev/loop-control").exists()):
        return "no /dev/net/tun or /dev/loop-control"
    try:
        network.run("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "true")
        network.run("losetup", "--find")
        network.run("ip", "link", "add", "rj-trial", "type", "bridge")
    except RuntimeError as error:
        return f"this machine does not allow it: {error}"
    network.run("ip", "link", "del", "rj-trial")
    return None


class Rig:
    """Hosts and S3; `home` is the home folder of the user at the laptop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.key = folder / "key"
        self.hosts = {name: Host(name, at, folder) for name, at in ADDRESSES.items()}
        self.s3: RigS3

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def create(self) -> None:
        (self.home / ".ssh").mkdir(parents=True)
        network.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        names = "".join(f"{at} {name}\n" for name, at in ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        network.add_bridge()
        self.s3 = RigS3.start(self.folder)
        for host in self.hosts.values():
            host.create()
            host.power_on()

    def remove(self) -> None:
        with contextlib.ExitStack() as stack:  # every one of these, whatever fails
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.callback(network.remove_bridge)
            for host in self.hosts.values():
                stack.callback(host.remove)
            if hasattr(self, "s3"):
                stack.callback(self.s3.stop)


@contextlib.contextmanager
def running_rig() -> Iterator[Rig]:
    """Makes a rig, and takes it down again whatever happens, also after SIGTERM.

    There is one rig on a machine; a second one waits. What a killed one has left is removed.
    """
    folder = Path(tempfile.gettempdir()) / "rayjepa-rig"
    before = signal.signal(signal.SIGTERM, _end)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rig = Rig(folder)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            rig.create()
            yield rig
        finally:
            rig.remove()
            signal.signal(signal.SIGTERM, before)


def _end(*_: object) -> NoReturn:
    raise KeyboardInterrupt("SIGTERM")
