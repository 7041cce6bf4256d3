"""The scripts that set up nodes on AWS, with stubs for the programs that they call."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helpers.repository import ROOT

SCRIPTS = ROOT / "deploy/aws"


class Node:
    """A pretended machine: an empty home, and programs that log their arguments.

    Args:
        folder: where its home, its programs and their log are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        (folder / "rayjepa").mkdir()
        self.bin.mkdir()
        for name in ("constraints.txt", "pyproject.toml"):
            (folder / "rayjepa" / name).write_text(name)
        self.stub("sudo", 'exec env "$@"')
        self.stub("sleep")
        self.stub("aws")
        self.stub("apt-get")
        # No ensurepip: a bare Ubuntu. `-m venv DIR` makes a pip.
        self.stub(
            "python3",
            f'[ "$1" = -c ] && exit 1; mkdir -p "$3/bin"; cp {self.bin}/log_only "$3/bin/pip"',
        )
        self.stub("log_only")

    def stub(self, name: str, does: str = "") -> None:
        """Adds a program."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "$(basename "$0") $*" >> {self.folder}/log\n{does}\n')
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **env: str) -> list[str]:
        """Returns the calls of one run of a script."""
        (self.folder / "log").write_text("")
        paths = {"HOME": str(self.folder), "PATH": f"{self.bin}:{os.environ['PATH']}"}
        subprocess.run(["bash", SCRIPTS / script, *arguments], env=paths | env, check=True)
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def pips(calls: list[str]) -> list[str]:
    return [call for call in calls if call.startswith("pip ")]


def test_a_node_is_installed_once_and_again_when_the_constraints_change(node: Node) -> None:
    calls = pips(node.run("install.sh"))
    assert len(calls) == 2
    assert all("-c" in call and "--no-index" not in call for call in calls)
    assert node.run("install.sh") == []  # an image that has it all starts at once
    (node.folder / "rayjepa/constraints.txt").write_text("another")
    assert len(pips(node.run("install.sh"))) == 2


def test_wheels_come_from_s3_if_it_has_them(node: Node) -> None:
    calls = node.run("install.sh", RAYJEPA_WHEELHOUSE="s3://bucket/wheelhouse")
    assert any(
        call.startswith("aws s3 sync") and "s3://bucket/wheelhouse" in call for call in calls
    )
    assert all("--no-index --find-links" in call for call in pips(calls))


def test_apt_is_tried_until_its_lock_is_free(node: Node) -> None:
    node.stub(
        "apt-get", f'echo x >> {node.folder}/tries; [ "$(wc -l < {node.folder}/tries)" -gt 3 ]'
    )
    calls = node.run("install.sh")
    assert len([call for call in calls if call.startswith("sleep")]) == 3
    assert [call.split()[-1] for call in calls if call.startswith("apt-get")] == [
        *["update"] * 4,
        "python3-venv",
    ]


@pytest.mark.parametrize("disks", [0, 1, 2])
def test_disks_of_the_instance_are_mounted_if_there_are_any(node: Node, disks: int) -> None:
    listed = "".join(f"/dev/nvme{n}n1 Amazon EC2 NVMe Instance Storage\\n" for n in range(disks))
    listed += "/dev/nvme9n1 Amazon Elastic Block Store\\n"
    node.stub(
        "lsblk",
        f"case $1 in -dnpo) printf '{listed}';; -no) [ $2 = TYPE ] && echo disk || echo;; esac",
    )
    node.stub("mountpoint", "exit 1")
    for name in ("mdadm", "mkfs.ext4", "mount", "chown"):
        node.stub(name)
    scratch = node.folder / "scratch"
    calls = node.run("nvme.sh", RAYJEPA_SCRATCH=str(scratch))
    assert (scratch / "tmp").is_dir()
    made = [call.split()[-1] for call in calls if call.startswith("mkfs.ext4")]
    assert made == [[], ["/dev/nvme0n1"], ["/dev/md/scratch"]][disks]
    assert len([call for call in calls if call.startswith("mount ")]) == min(disks, 1)
    assert not any("nvme9n1" in call for call in calls)  # the root volume is left alone


@pytest.mark.parametrize("asked_before", [0, 2])
def test_ray_is_told_when_a_spot_instance_ends(node: Node, asked_before: int) -> None:
    """AWS's metadata answers 404, for which curl ends with 22, until there is a notice."""
    ends = datetime.now(UTC) + timedelta(seconds=110)
    told = f'{{"action": "terminate", "time": "{ends:%Y-%m-%dT%H:%M:%SZ}"}}'
    node.stub(
        "curl",
        f'case "$*" in *token) echo t; exit;; esac; echo x >> {node.folder}/asked\n'
        f'[ "$(wc -l < {node.folder}/asked)" -gt {asked_before} ] || exit 22\n'
        f"echo '{told}'",
    )
    node.stub("pgrep", "echo '77 /ray/raylet --node_id=0 --node-id=4fe2 --node-ip-address=1'")
    node.stub("ray")
    calls = node.run("spot_notice.sh", "10.0.0.1:6379")
    (drained,) = (call for call in calls if call.startswith("ray "))
    assert drained.startswith(
        "ray drain-node --address 10.0.0.1:6379 --node-id 4fe2 "
        "--reason DRAIN_NODE_REASON_PREEMPTION "
    )
    assert 60 < int(drained.rpartition(" ")[2]) <= 110
    assert len([call for call in calls if call.startswith("sleep")]) == asked_before
