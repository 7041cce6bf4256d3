"""Which network interface gloo uses, whatever the host is called.

gloo, which carries what lies on a CPU, binds to the address to which the host's own name resolves.
Where the name resolves nowhere that is 127.0.0.1, and on a Debian host of one's own 127.0.1.1: no
other host reaches a worker there, and the group ends with `Connection refused`. A name of 64 bytes
is an error even on one host. An interface that is named is used in place of all that.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

INTERFACE = "GLOO_SOCKET_IFNAME"
"""gloo's setting; one that the user has made stays."""
SIOCGIFADDR = 0x8915  # linux/sockios.h
IPV6 = Path("/proc/net/if_inet6")


def use_address_of_node() -> None:
    """Lets gloo use the address by which the other nodes of the cluster reach this one."""
    import ray

    use_interface_of(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def use_interface_of(address: str = "127.0.0.1") -> None:
    """Lets gloo use the interface that has an address of this host.

    Args:
        address: IPv4 or IPv6; the usual one is for processes of one host.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Returns the network interface that has an address; None if that cannot be known."""
    if ":" in address:
        return _interface_of_ipv6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(asked, SIOCGIFADDR, request)
            except OSError:  # it has no address, or this is not Linux
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    rows = IPV6.read_text().splitlines() if IPV6.exists() else []
    return next((row.split()[-1] for row in rows if row.startswith(wanted)), None)
