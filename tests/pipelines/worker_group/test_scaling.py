"""Which group starts, and when a running one is asked to stop; with a pretended cluster."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from pipelines.worker_group import scaling
from pipelines.worker_group.cluster_use import ClusterUse
from pipelines.worker_group.group import Group, Host, this_group
from pipelines.worker_group.scaling import ElasticGroup, FixedGroup
from pipelines.worker_group.stopping import ask_to_stop


@pytest.fixture
def group() -> Iterator[Group]:
    this_group.cache_clear()
    yield this_group()
    this_group.cache_clear()


class Pretended:
    """A cluster of nodes with four CPUs each, and an elastic policy of 2 to 8 workers on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = 2
        self.held: dict[str, dict[str, float]] = {}
        self.leaving: frozenset[str] = frozenset()
        self.asked: list[tuple[Any, str]] = []
        config = ScalingConfig(
            num_workers=(2, 8),
            resources_per_worker={"CPU": 1.5},
            elastic_resize_monitor_interval_s=0,
        )
        self.policy = ElasticGroup(config, (2, 4, 8))
        monkeypatch.setattr(scaling, "read_use", lambda _: self.use())
        monkeypatch.setattr(scaling, "read_leaving", lambda: self.leaving)
        monkeypatch.setattr(scaling.time, "sleep", lambda _: None)
        monkeypatch.setattr(ray, "get", lambda refs: refs)
        monkeypatch.setattr(self.policy, "_maybe_send_resource_request", lambda: None)

    def use(self) -> ClusterUse:
        names = [f"n{index}" for index in range(self.nodes)]
        there = {name: {"CPU": 4.0} for name in names if name not in self.leaving}
        return ClusterUse(nodes=there, held=self.held)

    def start(self) -> int:
        """Returns the size of the group that starts; 0 if it waits."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else 0

    def look(self, workers: int, name: str = "aa") -> list[str]:
        """Returns what a running group of this size is asked for."""
        self.asked.clear()
        worker = SimpleNamespace(execute_async=lambda *call: self.asked.append(call))
        handle = SimpleNamespace(placement_group=SimpleNamespace(id=bytes.fromhex(name)))
        state: Any = SimpleNamespace(
            start_time=0,
            num_workers=workers,
            workers=[worker] * workers,
            placement_group_handle=handle,
        )
        status: Any = None
        decision = self.policy.make_decision_for_running_worker_group(state, status)
        assert isinstance(decision, NoopDecision), "Ray would end the group without a checkpoint"
        assert all(function is ask_to_stop for function, _ in self.asked)
        return [reason for _, reason in self.asked]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, group: Group) -> Pretended:
    return Pretended(monkeypatch)


def test_the_largest_allowed_size_that_fits_starts(cluster: Pretended) -> None:
    sizes = []
    for cluster.nodes in range(1, 6):
        sizes.append(cluster.start())
    assert sizes == [2, 4, 4, 8, 8]


def test_what_others_hold_is_not_there(cluster: Pretended) -> None:
    cluster.held = {"n0": {"CPU": 4.0}}
    assert cluster.start() == 2
    cluster.held["n1"] = {"CPU": 2.0}
    assert cluster.start() == 0
    cluster.nodes = 3
    assert cluster.start() == 2


def test_what_a_stopped_job_had_asked_for_is_there(
    cluster: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's coordinator keeps it for minutes, so it has nothing left for the next job."""
    nothing_left = SimpleNamespace(remote=lambda *_, **__: {})
    coordinator = SimpleNamespace(get_reserved_resources=nothing_left)
    monkeypatch.setattr(ElasticGroup, "_autoscaling_coordinator", coordinator, raising=False)
    monkeypatch.setattr(ray, "get", lambda refs, timeout=None: refs)
    assert cluster.start() == 4


def test_hosts_at_fault_or_about_to_go_are_not_used(cluster: Pretended, group: Group) -> None:
    cluster.nodes = 4
    group.leave_out(Host(node="n0", address="10.0.0.1"), "full disk")
    cluster.leaving = frozenset({"n1"})
    assert cluster.start() == 4
    expected = {"ray.io/node-id": "!in(n0,n1)"}
    fixed = FixedGroup(ScalingConfig(num_workers=2))
    for policy in (cluster.policy, fixed):
        assert policy.on_controller_start_worker_group() == expected


def test_a_running_group_is_asked_once_if_a_larger_one_fits(cluster: Pretended) -> None:
    assert cluster.look(workers=4) == []
    cluster.nodes = 4
    told = cluster.look(workers=4)
    assert told == ["there is room for 8 workers instead of 4"] * 4
    assert cluster.look(workers=4) == []  # it is on its way
    assert len(cluster.look(workers=4, name="bb")) == 4  # another group, as small again


def test_a_running_group_is_not_asked_to_shrink(cluster: Pretended) -> None:
    cluster.nodes = 1
    assert cluster.look(workers=4) == []
    cluster.nodes = 0
    assert cluster.look(workers=4) == []
