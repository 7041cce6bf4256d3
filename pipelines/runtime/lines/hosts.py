"""Says when a host of the cluster is lost while a job runs, and when one has come in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EXPECTED = (1, 4)
"""Ray's numbers of the reasons for which a node ends as it should: told to, or idle for long."""
PREEMPTED = 3

Node = Mapping[str, Any]
"""A node as `ray.nodes` has it."""


class Hosts:
    """Compares the nodes of the cluster from one look to the next."""

    def __init__(self) -> None:
        self._alive: set[str] | None = None
        self._lost = 0

    def lines(self, nodes: Sequence[Node]) -> list[str]:
        """Returns what is to be said after a look.

        Args:
            nodes: All nodes that there are or were.
        """
        alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
        before, self._alive = self._alive, set(alive)
        if before is None:
            return []
        gone = [node for node in nodes if node["NodeID"] in before - alive.keys()]
        lost = [node for node in gone if node.get("DeathReason") not in EXPECTED]
        told = [f"WARNING: host {_where(node)} {_fate(node)}" for node in lost]
        self._lost += len(lost)
        for node in (alive[key] for key in alive.keys() - before):
            if self._lost:  # others that come are the autoscaler's everyday work
                self._lost -= 1
                told.append(f"host {_where(node)} has joined the cluster")
        return told


def _where(node: Node) -> str:
    return str(node["NodeManagerAddress"])


def _fate(node: Node) -> str:
    if node.get("DeathReason") == PREEMPTED:
        return "was taken away with notice; what ran there starts again elsewhere"
    return "is lost; what ran there starts again elsewhere"
