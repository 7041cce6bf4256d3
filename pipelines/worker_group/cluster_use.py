"""What the nodes of a Ray cluster have, and what everything but one group of workers holds of it.

Tasks are left out, because they come and go within seconds; so are the reading tasks of other runs,
whose workers are counted instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Resources = Mapping[str, float]
TRAIN_WORKER = "RayTrainWorker"
"""Class of the actors of Ray Train, one a worker."""
EPSILON = 1e-6
LARGEST = 4
"""Holders named in a line."""


@dataclass(frozen=True, kw_only=True)
class ClusterUse:
    """Resources by name, by node, at one moment."""

    nodes: Mapping[str, Resources]
    """What every node has that is alive and not about to be taken away."""
    held: Mapping[str, Resources] = field(default_factory=dict)
    """What placement groups and actors of others hold of it."""
    holders: Mapping[str, float] = field(default_factory=dict)
    """CPUs by who holds them, in words."""
    readers: int = 0
    """Workers of other runs, each of which reads data too."""

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.get("CPU", 0.0) for node in self.nodes.values())

    @property
    def held_cpus(self) -> float:
        """CPUs that others hold."""
        return sum(node.get("CPU", 0.0) for node in self.held.values())

    def told(self) -> str:
        """Says who holds CPUs, as in `Serve's Embedder 2, another run's workers 3`."""
        largest = sorted(self.holders.items(), key=lambda item: (-item[1], item[0]))[:LARGEST]
        return ", ".join(f"{who} {cpus:g}" for who, cpus in largest)

    def fitting(self, need: Resources, without: Collection[str] = ()) -> int:
        """Returns how many workers fit beside what others hold.

        Args:
            need: What one worker reserves; something, at the least.
            without: Nodes that are not to be used.
        """
        count = 0
        for node, there in self.nodes.items():
            if node in without:
                continue
            held = self.held.get(node, {})
            fits = (
                (there.get(name, 0.0) - held.get(name, 0.0) + EPSILON) // amount
                for name, amount in need.items()
                if amount > 0
            )
            count += max(0, int(min(fits)))
        return count


def read_use(own_group: str | None = None) -> ClusterUse:
    """Asks Ray what there is and who holds it.

    Args:
        own_group: Id of the placement group that is not counted as held, hex.
    """
    # Ray's public calls know neither what actors hold, without a dashboard, nor draining nodes.
    from ray._private.state import state

    groups: dict[str, dict[str, Any]] = state.placement_group_table()  # type: ignore[no-untyped-call]
    leaving, nodes = read_leaving(), state.total_resources_per_node()
    return use_of(
        nodes={node: there for node, there in nodes.items() if node not in leaving},
        groups={key: group for key, group in groups.items() if key != own_group},
        actors=[a for a in _actors(state) if a.group is None or a.group != own_group],
    )


def read_leaving() -> frozenset[str]:
    """Returns the nodes that are about to be taken away."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes() or {})


@dataclass(frozen=True, kw_only=True)
class Actor:
    """An actor that is alive."""

    name: str
    """Of its class."""
    node: str
    group: str | None
    """Id of its placement group, hex; None if it is in none."""
    resources: Resources


def _actors(state: Any) -> list[Actor]:
    from ray.core.generated import gcs_pb2

    accessor = state._connect_and_get_accessor()
    parse: Any = gcs_pb2.ActorTableData.FromString  # type: ignore[attr-defined]
    return [
        Actor(
            name=actor.class_name,
            node=actor.address.node_id.hex(),
            group=actor.placement_group_id.hex() or None,
            resources=dict(actor.required_resources),
        )
        for actor in map(parse, accessor.get_actor_table(None, "ALIVE"))
    ]


def use_of(
    nodes: Mapping[str, Resources],
    groups: Mapping[str, Mapping[str, Any]],
    actors: Iterable[Actor],
) -> ClusterUse:
    """Adds up what others hold.

    Args:
        nodes: Resources of the nodes.
        groups: Placement groups of others by id, as `ray.util.placement_group_table` has them.
        actors: Actors of others.
    """
    held: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    holders: dict[str, float] = defaultdict(float)
    actors = list(actors)
    inside = {actor.group: _called(actor.name) for actor in actors if actor.group}
    for key, group in groups.items():
        for index, bundle in _placed(group):
            _add(held[group["bundles_to_node_id"][index]], bundle)
            if group["bundles_to_node_id"][index] in nodes:
                holders[inside.get(key, "a placement group")] += bundle.get("CPU", 0.0)
    for actor in actors:
        if actor.group is None and actor.node in nodes:
            _add(held[actor.node], actor.resources)
            holders[_called(actor.name)] += actor.resources.get("CPU", 0.0)
    return ClusterUse(
        nodes=nodes,
        held={node: dict(amounts) for node, amounts in held.items() if node in nodes},
        holders={who: cpus for who, cpus in holders.items() if cpus > 0},
        readers=sum(actor.name == TRAIN_WORKER for actor in actors),
    )


def _add(total: dict[str, float], amounts: Resources) -> None:
    for name, amount in amounts.items():
        total[name] += amount


def _placed(group: Mapping[str, Any]) -> Iterable[tuple[int, dict[str, float]]]:
    if group["state"] in ("CREATED", "RESCHEDULING"):
        yield from group["bundles"].items()


def _called(class_name: str) -> str:
    """Names what an actor belongs to."""
    if class_name == TRAIN_WORKER:
        return "workers of other runs"
    if class_name.startswith("ServeReplica:"):
        return f"Serve's {class_name.rpartition(':')[2]}"
    return class_name.rpartition(".")[2]
