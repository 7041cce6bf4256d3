"""A host that is lost is told once, and so is the one that comes in its place."""

from __future__ import annotations

from typing import Any

from pipelines.runtime.lines.hosts import EXPECTED, PREEMPTED, Hosts


def node(number: int, alive: bool = True, reason: int = 0) -> dict[str, Any]:
    address = f"192.0.2.{number}"
    name = f"n{number}"
    return {"NodeID": name, "Alive": alive, "NodeManagerAddress": address, "DeathReason": reason}


def test_a_loss_and_what_comes_after_it() -> None:
    hosts = Hosts()
    assert hosts.lines([node(1), node(2)]) == []
    assert hosts.lines([node(1), node(2, alive=False, reason=2)]) == [
        "WARNING: host 192.0.2.2 is lost; what ran there starts again elsewhere"
    ]
    assert hosts.lines([node(1), node(2, alive=False, reason=2)]) == []
    came = [node(1), node(2, alive=False, reason=2), node(3), node(4)]
    assert len(hosts.lines(came)) == 1  # one in place of one; the other is the autoscaler's
    assert hosts.lines(came) == []


def test_a_host_that_is_taken_away_with_notice() -> None:
    hosts = Hosts()
    hosts.lines([node(1)])
    assert "taken away with notice" in hosts.lines([node(1, False, PREEMPTED)])[0]


def test_what_the_autoscaler_does_every_day_is_not_told() -> None:
    for reason in EXPECTED:
        hosts = Hosts()
        hosts.lines([node(1), node(2)])
        assert hosts.lines([node(1), node(2, False, reason)]) == []
        assert hosts.lines([node(1), node(2, False, reason), node(3)]) == []
