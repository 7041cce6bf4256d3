"""gloo's interface is that of the node's address, whatever the host's name resolves to.

Between hosts, with names of many kinds: tests/cluster/test_host_names.py.
"""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest

from pipelines.worker_group.interface import (
    INTERFACE,
    IPV6,
    interface_of,
    use_address_of_node,
    use_interface_of,
)


def own_address() -> str:
    """The address by which this host would send a packet to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this host is on no network")
        return str(asked.getsockname()[0])


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("198.51.100.7") is None  # nobody's
    found = interface_of(own_address())
    assert found in {name for _, name in socket.if_nameindex()} - {"lo"}


@pytest.mark.skipif(not IPV6.exists(), reason="no IPv6 here")
def test_the_interface_of_an_ipv6_address() -> None:
    assert interface_of("::1") == "lo"
    assert interface_of("2001:db8::7") is None


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "")  # what the code sets is taken back at the end
    monkeypatch.delenv(INTERFACE)
    use_interface_of("198.51.100.7")
    assert INTERFACE not in os.environ
    use_interface_of("127.0.0.1")
    assert os.environ[INTERFACE] == "lo"
    monkeypatch.setenv(INTERFACE, "eth7")
    use_interface_of("127.0.0.1")
    assert os.environ[INTERFACE] == "eth7"


def test_workers_choose_it_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.worker_group import backend

    done: list[object] = []
    monkeypatch.setattr(backend._TorchBackend, "on_start", lambda *_: done.append("meet"))
    workers = SimpleNamespace(execute=done.append)
    config = backend.NodeTorchConfig(backend="gloo")
    config.backend_cls().on_start(workers, config)
    assert done == [use_address_of_node, "meet"]
