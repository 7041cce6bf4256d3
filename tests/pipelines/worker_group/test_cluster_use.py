"""What others hold of a cluster, and how many workers fit beside it."""

from __future__ import annotations

import pytest

from pipelines.worker_group.cluster_use import Actor, read_use, use_of

NODES = {"a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 4.0}}
NEED = {"CPU": 1.5}


def group(state: str, *places: str) -> dict:
    return {
        "state": state,
        "bundles": {index: {"CPU": 1.5} for index in range(len(places))},
        "bundles_to_node_id": dict(enumerate(places)),
    }


def actor(name: str, node: str, cpus: float, inside: str | None = None) -> Actor:
    return Actor(name=name, node=node, group=inside, resources={"CPU": cpus} if cpus else {})


def test_an_empty_cluster_is_all_free() -> None:
    use = use_of(NODES, {}, [])
    assert (use.cpus, use.held_cpus, use.readers, use.told()) == (8, 0, 0, "")
    assert use.fitting(NEED) == 4
    assert use.fitting({"CPU": 1, "GPU": 1}) == 1
    assert use.fitting(NEED, without={"a"}) == 2


def test_groups_and_actors_hold_what_they_reserve_once() -> None:
    groups = {
        "g1": group("CREATED", "a", "b"),
        "g2": group("PENDING", "a"),
        "g3": group("REMOVED", "b"),
    }
    actors = [
        actor("RayTrainWorker", "a", 1.5, "g1"),  # inside its group, not beside it
        actor("RayTrainWorker", "b", 1.5, "g1"),
        actor("ServeReplica:default:Embedder", "a", 2),
        actor("Controller", "b", 0),
        actor("evaluate.<locals>.Reader", "b", 0.25),
        actor("Lost", "gone", 3),
    ]  # fmt: skip
    use = use_of(NODES, groups, actors)
    assert use.held_cpus == 5.25
    assert use.readers == 2
    assert use.told() == "workers of other runs 3, Serve's Embedder 2, Reader 0.25"
    assert use.fitting(NEED) == 1  # 0.5 left on a, 2.25 on b


@pytest.mark.ray
def test_ray_says_what_others_hold(ray_local: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    before = read_use()

    @ray.remote(num_cpus=1)
    class Hog:
        def hold(self) -> None:
            pass

    hog, bundles = Hog.remote(), placement_group([{"CPU": 0.5}] * 2)
    try:
        ray.get([hog.hold.remote(), bundles.ready()])
        use, without = read_use(), read_use(bundles.id.hex())
        assert use.held_cpus - before.held_cpus == pytest.approx(2)
        assert without.held_cpus - before.held_cpus == pytest.approx(1)
        assert use.cpus == 4
        assert "Hog 1" in use.told() or "Hog 1" in without.told()
        assert use.fitting({"CPU": 1}) == before.fitting({"CPU": 1}) - 2
    finally:
        ray.kill(hog)
        remove_placement_group(bundles)
