"""The rig's network: a bridge, a cable to every host, and faults of cables.

The machine itself is 10.77.0.1 on the bridge. It plays the user's laptop, and S3 listens there.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BRIDGE = "rjbr0"
BRIDGE_MAC = "02:00:0a:4d:00:01"
"""Its own, because a bridge without one takes the least of its cables', and so another one whenever
a cable comes or goes; hosts would go on sending to the old one."""
LAPTOP = "10.77.0.1"
RELAY = Path(__file__).with_name("slow_cable.py")
FORWARDING = "3"  # BR_STATE_FORWARDING of linux/if_bridge.h


def run(*command: str, check: bool = True) -> str:
    """Returns what a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def namespace(host: str) -> str:
    return f"rj-{host}"


def add_bridge() -> None:
    remove_bridge()
    run("ip", "link", "add", BRIDGE, "address", BRIDGE_MAC, "type", "bridge")
    run("ip", "addr", "add", f"{LAPTOP}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


def remove_bridge() -> None:
    run("ip", "link", "del", BRIDGE, check=False)


def add_cable(host: str, address: str) -> None:
    """Makes a host's network namespace, with one interface on the bridge."""
    remove_cable(host)
    ns = namespace(host)
    run("ip", "netns", "add", ns)
    run("ip", "link", "add", f"v-{host}", "type", "veth", "peer", "name", "eth0", "netns", ns)
    run("ip", "link", "set", f"v-{host}", "master", BRIDGE)
    run("ip", "-n", ns, "addr", "add", f"{address}/24", "dev", "eth0")
    run("ip", "-n", ns, "link", "set", "lo", "up")
    run("ip", "-n", ns, "link", "set", "eth0", "up")
    plug(host)


def remove_cable(host: str) -> None:
    run("ip", "link", "del", f"v-{host}", check=False)
    run("ip", "netns", "del", namespace(host), check=False)


def plug(host: str) -> None:
    run("ip", "link", "set", f"v-{host}", "up")
    await_forwarding(f"v-{host}")


def await_forwarding(port: str, patience_s: float = 30.0) -> None:
    """Waits until the bridge carries frames to and from a port.

    The kernel looks at new links at most once a second, and drops what comes before.
    """
    state = Path("/sys/class/net", port, "brport", "state")
    deadline = time.monotonic() + patience_s
    while state.read_text().strip() != FORWARDING:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the bridge does not forward for {port}")
        time.sleep(0.01)


def unplug(host: str) -> None:
    """Pulls the cable; what runs on the host stays."""
    run("ip", "link", "set", f"v-{host}", "down")


@contextlib.contextmanager
def cut(host: str) -> Iterator[None]:
    """Pulls the cable for the length of a block."""
    unplug(host)
    try:
        yield
    finally:
        plug(host)


@contextlib.contextmanager
def parted(one: str, address_of_one: str, other: str, address_of_other: str) -> Iterator[None]:
    """Lets no packet pass between two hosts, which reach all others."""
    routes = ((one, address_of_other), (other, address_of_one))
    for host, address in routes:
        run("ip", "-n", namespace(host), "route", "add", "blackhole", address)
    try:
        yield
    finally:
        for host, address in routes:
            run("ip", "-n", namespace(host), "route", "del", "blackhole", address, check=False)


@contextlib.contextmanager
def slow(host: str, *, ms: float, loss: float) -> Iterator[None]:
    """Delays every frame of a host by `ms` each way, and loses the share `loss` of them.

    A process carries the frames, because not every kernel has netem.
    """
    veth, tap, ns = f"v-{host}", f"t-{host}", namespace(host)
    plain = ("tso", "off", "gso", "off", "gro", "off", "tx", "off")
    run("ip", "netns", "exec", ns, "ethtool", "-K", "eth0", *plain)
    run("ethtool", "-K", veth, *plain)
    run("ip", "link", "set", veth, "nomaster")
    relay = subprocess.Popen(
        [sys.executable, str(RELAY), veth, tap, str(ms / 1000), str(loss)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert relay.stdout is not None
        assert relay.stdout.readline() == "ready\n"
        run("ethtool", "-K", tap, *plain, check=False)
        run("ip", "link", "set", tap, "master", BRIDGE)
        run("ip", "link", "set", tap, "up")
        await_forwarding(tap)
        yield
    finally:
        relay.kill()
        relay.wait()
        run("ip", "link", "set", veth, "master", BRIDGE)
        await_forwarding(veth)
