"""Hosts with odd names: workers meet, a run is held, and a message names the host, all the same.

The kernel takes any 64 bytes for a host's name. Whether it resolves, and to what, is up to
/etc/hosts and DNS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterator

import pytest

from helpers.cluster.cluster import RigCluster
from helpers.cluster.faults import RESTART_S, Watch
from helpers.cluster.hosts import CODE, Host
from helpers.cluster.rig import ADDRESSES, Rig
from helpers.cluster.runs import disturbed, pretrain
from helpers.cluster.s3 import BUCKET

pytestmark = pytest.mark.slow

RAYLET = r"raylet/raylet "
WITHIN_S = 60
ALONE_S = 15
"""After which processes that have not met never will: those that meet do within four."""
MEET = """
import datetime, sys, torch, torch.distributed as dist
from pipelines.worker_group.interface import use_interface_of
rank, head, own = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if own:
    use_interface_of(own)
patience = datetime.timedelta(seconds=20)
dist.init_process_group("gloo", f"tcp://{head}:29511", patience, world_size=2, rank=rank)
value = torch.ones(1)
dist.all_reduce(value)
print("sum", value.item())
"""
HOLD = """
import sys
from models.scratch import host_name, scratch
from pipelines.runs.lease import held
from pipelines.training.loggers import _tensorboard
print(host_name())
with scratch("trial") as folder, held(sys.argv[1], take_over=False, say=print) as lease:
    board = _tensorboard(folder, 0)
    board.add_scalar("loss", 1.0, 1)
    board.close()
    with held(sys.argv[1], take_over=False, say=print):
        pass
"""


OWN = "own"


@dataclasses.dataclass(frozen=True)
class Name:
    """A name of a host, and what becomes of it."""

    name: bytes
    shown: str
    meets: bool = False
    """Whether gloo finds the other hosts by the name alone."""
    resolves_to: str = ""
    """An address; `OWN` is that of the host."""


NAMES = {
    "resolves": Name(b"node", "node", meets=True, resolves_to=OWN),
    "nowhere": Name(b"nowhere", "nowhere"),
    "Debian's": Name(b"alone", "alone", resolves_to="127.0.1.1"),
    "upper case": Name(b"GPU_Node_A7", "GPU_Node_A7"),
    "64 bytes": Name(b"n" * 64, "n" * 64, resolves_to=OWN),
    "not ASCII": Name("h\u00f6he-\u4e03".encode(), "h\u00f6he-\u4e03"),
    "not UTF-8": Name(b"h\xf6he", "h\ufffdhe"),
}
SET = "import socket, sys; socket.sethostname(bytes.fromhex(sys.argv[1]))"


@contextlib.contextmanager
def called(host: Host, name: Name) -> Iterator[None]:
    """Gives a host another name for the block."""
    hosts = host.root / "etc/hosts"
    before = hosts.read_text()
    address = host.address if name.resolves_to == OWN else name.resolves_to
    told = f"{address} {name.shown}\n" if address else ""
    hosts.write_text(f"127.0.0.1 localhost\n{told}")
    host.run("python", "-c", SET, name.name.hex())
    try:
        yield
    finally:
        host.run("python", "-c", SET, host.name.encode().hex())
        hosts.write_text(before)


@pytest.fixture(scope="module")
def installed(rig: Rig) -> Rig:
    """The rig with our code on both workers."""
    for name in ("w1", "w2"):
        rig[name].install("models", "pipelines")
    return rig


def meet(rig: Rig, by_address: bool) -> list[str]:
    """What a process on each worker prints: the sum, or the error."""
    head = ADDRESSES["w2"]
    started = [
        rig[name].start(
            *("python", "-c", MEET, str(rank), head, ADDRESSES[name] if by_address else ""),
            env={"PYTHONPATH": CODE, "OMP_NUM_THREADS": "1"},
        )
        for rank, name in enumerate(("w2", "w1"))
    ]
    return [_told(process, WITHIN_S if by_address else ALONE_S) for process in started]


def _told(process: subprocess.Popen[str], within_s: float = WITHIN_S) -> str:
    """What a process prints until it ends, or for so long."""
    try:
        return process.communicate(timeout=within_s)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


@pytest.mark.parametrize("kind", NAMES)
def test_workers_meet(installed: Rig, kind: str) -> None:
    """By the addresses of their nodes always; by the name that both have, only if it resolves."""
    name = NAMES[kind]
    with called(installed["w1"], name), called(installed["w2"], name):
        for told in meet(installed, by_address=True):
            assert "sum 2.0" in told, told
        found = meet(installed, by_address=False)
    assert all("sum 2.0" in told for told in found) == name.meets, found


@pytest.mark.parametrize("kind", NAMES)
def test_a_run_is_held_and_the_host_is_named(installed: Rig, kind: str) -> None:
    """Lease, temporary folder and TensorBoard's file of a host with such a name."""
    env = installed.s3.env | {"PYTHONPATH": CODE, "LANG": "C.UTF-8"}
    host, run = installed["w1"], f"s3://{BUCKET}/named-{kind.replace(' ', '-')}"
    with called(host, NAMES[kind]):
        told = _told(host.start("python", "-u", "-c", HOLD, run, env=env))
    lines = told.splitlines()
    assert lines[0] == NAMES[kind].shown, told
    assert "RunInUseError" in told
    assert f" on {NAMES[kind].shown}, since " in told


def test_a_host_with_an_odd_name_trains(rig: Rig, request: pytest.FixtureRequest) -> None:
    """Ray starts on a host that has such a name, or starts anew, and it takes part in a run."""
    host, name = rig["w2"], "GPU_Node-H\u00f6he"  # Ray 2.60 does not start under 64 bytes
    with called(host, Name(name.encode(), name)):
        runs = bool(host.processes(RAYLET))
        if runs:
            host.signal(RAYLET)
        cluster: RigCluster = request.getfixturevalue("cluster")
        if runs:
            cluster.wait_for_nodes(len(ADDRESSES) - 1)
        cluster.wait_for_nodes(len(ADDRESSES))
        command = pretrain(request.getfixturevalue("shards"), "odd-name")
        with disturbed(cluster, "odd-name", command) as job:
            fault = "a host whose name is not ASCII and resolves nowhere"
            watch = Watch(job, "14", fault, "test_a_host_with_an_odd_name_trains")
            watch.went_on(RESTART_S)
            watch.record("it trains as any other", "nothing")
