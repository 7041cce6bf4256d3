"""The watch on a real cluster: what a group waits for, and a host that is killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from helpers.waiting import LIMIT_S, wait_until
from pipelines.runtime.lines import waiting, watch
from pipelines.runtime.lines.watch import Group, cluster_lines, room_of


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.05)
    monkeypatch.setattr(waiting, "FIRST_S", 0.1)


def wait_for(lines: list[str], holds: Callable[[str], bool]) -> str:
    wait_until(lambda: any(map(holds, lines)))
    return next(filter(holds, lines))


@pytest.mark.ray
def test_a_group_waits_for_room_and_gets_it(ray_local: None, often: None) -> None:
    """On the four CPUs of the session."""
    import ray
    from ray.util import placement_group, remove_placement_group

    lines: list[str] = []
    group = Group({"CPU": 3.0}, 2)
    with cluster_lines(lines.append, group):
        line = wait_for(lines, lambda line: "waiting" in line)
        assert "3 CPUs on one host for 1 of 2 workers" in line
        assert "the cluster has 4 CPUs on 1 host" in line
        placed = placement_group([{"CPU": 3.0}], strategy="PACK")
        try:
            assert placed.wait(LIMIT_S)
            assert room_of(group, ray.nodes()).placed
            assert not room_of(Group({"CPU": 2.0}, 2), ray.nodes()).placed
            wait_for(lines, lambda line: line.startswith("there is room for the workers after"))
        finally:
            remove_placement_group(placed)
