"""The hosts themselves: what a fault does to one, before a cluster runs there."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from helpers.cluster import network
from helpers.cluster.hosts import Host
from helpers.cluster.rig import Rig
from helpers.waiting import wait_until

ASK = """
import time, urllib.request
start = time.time()
urllib.request.urlopen("{url}", timeout={patience_s}).read()
print(time.time() - start)
"""

SOON_S = 2
"""What is known to get no answer is waited for this long."""


def seconds_to_s3(rig: Rig, name: str, patience_s: float = 20) -> float | None:
    """Seconds that S3 takes to answer a host; None if it does not."""
    ask = ASK.format(url=rig.s3.proxy.url, patience_s=patience_s)
    try:
        told = rig[name].run("python3", "-c", ask)
    except RuntimeError:
        return None
    return float(told)


def reaches(one: Host, other: Host, patience_s: float = 20) -> bool:
    ask = f"import socket; socket.create_connection(('{other.address}', 22), timeout={patience_s})"
    try:
        one.run("python3", "-c", ask)
    except RuntimeError:
        return False
    return True


def test_a_host_has_a_name_and_processes_of_its_own(rig: Rig) -> None:
    w1 = rig["w1"]
    assert w1.run("hostname") == "w1\n"
    assert "sshd" in w1.run("ps", "-e")
    assert "pytest" not in w1.run("ps", "-ef")
    assert all("sshd" in line for line in w1.processes("sshd").values())
    command = ["ssh", "-q", "-i", str(rig.key), "-o", "StrictHostKeyChecking=no"]
    command += ["-o", "UserKnownHostsFile=/dev/null", f"root@{w1.address}", "hostname"]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "w1\n"


def test_a_power_cut_ends_the_processes_and_keeps_the_disk(rig: Rig) -> None:
    host = rig["w1"]
    host.run(
        "sh",
        "-c",
        "echo kept > /tmp/kept; echo lost > /dev/shm/lost; setsid sleep 1000 >/dev/null 2>&1 &",
    )
    (left,) = host.processes("sleep 1000")
    host.power_off()
    assert not reaches(rig["w2"], host, SOON_S)
    with pytest.raises(ProcessLookupError):
        os.kill(left, 0)
    host.power_on()
    assert host.run("cat", "/tmp/kept") == "kept\n"
    assert host.run("ls", "/dev/shm") == ""
    assert host.processes("sleep 1000") == {}


def test_what_a_host_writes_stays_there(rig: Rig) -> None:
    rig["w1"].run("sh", "-c", "echo x > /usr/local/of-w1")
    with pytest.raises(RuntimeError):
        rig["w2"].run("cat", "/usr/local/of-w1")


def test_a_disk_can_be_filled(rig: Rig) -> None:
    host = rig["w1"]
    write = ("dd", "if=/dev/zero", "of=/dev/shm/more", "bs=4k", "count=1")
    host.fill("/dev/shm")
    with pytest.raises(RuntimeError, match="No space left"):
        host.run(*write)
    host.free("/dev/shm")
    host.run(*write)


def test_cables(rig: Rig) -> None:
    w1, w2, head = rig["w1"], rig["w2"], rig["head"]
    assert reaches(w1, w2)
    with network.cut("w1"):
        assert not reaches(w2, w1, SOON_S)
    assert reaches(w2, w1)
    with network.parted("w1", w1.address, "w2", w2.address):
        assert not reaches(w1, w2, SOON_S)
        assert not reaches(w2, w1, SOON_S)
        assert reaches(w1, head)
    assert reaches(w1, w2)


def test_a_slow_network(rig: Rig) -> None:
    usual = [seconds_to_s3(rig, "w1") for _ in range(3)]
    with network.slow("w1", ms=50, loss=0.0):
        late = seconds_to_s3(rig, "w1")
    assert late is not None
    assert late > 0.2  # a connection and a request: two round trips of 100 ms
    assert min(seconds for seconds in usual if seconds is not None) < 0.2
    with network.slow("w1", ms=0, loss=1.0):
        assert seconds_to_s3(rig, "w1", SOON_S) is None
    # The host takes S3 for unreachable until it has asked for its address anew.
    wait_until(lambda: seconds_to_s3(rig, "w1") is not None)


def test_s3_as_the_hosts_see_it(rig: Rig) -> None:
    rig.s3.proxy.down()
    assert seconds_to_s3(rig, "w1", SOON_S) is None
    rig.s3.proxy.up()
    assert seconds_to_s3(rig, "w1") is not None
    rig.s3.proxy.begin_trouble(1.0, "hang")
    started = time.monotonic()
    assert seconds_to_s3(rig, "w1", SOON_S) is None
    assert time.monotonic() - started > 1.5
    rig.s3.proxy.end_trouble()
    assert seconds_to_s3(rig, "w1") is not None
