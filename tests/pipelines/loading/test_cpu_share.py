"""How the CPUs that others leave are divided among the ranks that read."""

from __future__ import annotations

import pytest

from helpers.pipelines.loading import config
from pipelines.loading.cpu_share import share_of
from pipelines.worker_group.cluster_use import ClusterUse


def use(held: dict[str, float], readers: int = 0, nodes: int = 2) -> ClusterUse:
    names = "abcdef"[:nodes]
    memory = {"object_store_memory": 1e9}
    return ClusterUse(
        nodes={name: {"CPU": 4.0, **memory} for name in names},
        held={name: {"CPU": cpus} for name, cpus in held.items()},
        readers=readers,
    )


def test_what_nobody_holds_is_divided_equally() -> None:
    share = share_of(config("x"), use({"a": 3.0}), world_size=2)
    assert share is not None
    assert (share.cpus, share.read_cpus, share.decode_cpus) == (2.5, 1.0, 0.0)
    assert share.object_store_bytes == 0.5e9


def test_serving_and_other_runs_leave_less() -> None:
    alone = share_of(config("x"), use({"a": 1.0, "b": 1.0}, readers=2), 2, in_group=True)
    beside = share_of(config("x"), use({"a": 3.0, "b": 3.0}, readers=4), 2, in_group=True)
    assert alone is not None
    assert beside is not None
    assert (alone.cpus, beside.cpus) == (3.0, 0.5)


def test_a_task_is_no_larger_than_what_one_node_has_left() -> None:
    """Otherwise it would wait for ever: 0.5 CPUs on each of four nodes are no CPU anywhere."""
    held = dict.fromkeys("abcd", 3.5)
    share = share_of(config("x"), use(held, nodes=4), world_size=1)
    assert share is not None
    assert (share.cpus, share.read_cpus) == (2.0, 0.5)
    in_data = share_of(config("x", decode_in="data"), use(held, nodes=4), world_size=1)
    assert in_data is not None
    assert in_data.decode_cpus <= 0.5
    assert in_data.read_cpus <= 0.125


@pytest.mark.parametrize("held", [{"a": 4.0, "b": 4.0}, {"a": 4.0, "b": 3.95}, {"a": 9.0}])
def test_too_little_is_none(held: dict[str, float]) -> None:
    nodes = 1 if "b" not in held else 2
    assert share_of(config("x"), use(held, nodes=nodes), world_size=2) is None


def test_what_a_task_itself_holds_is_not_free() -> None:
    assert share_of(config("x"), use({}), world_size=1, taken=8.0) is None
