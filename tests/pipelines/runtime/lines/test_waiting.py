"""When a run's workers wait for room on the cluster, one line says for what, and rarely again."""

from __future__ import annotations

import pytest

from pipelines.runtime.lines.waiting import Room, Waiting

HEAD, BIG, SMALL = {"CPU": 0.0, "memory": 9.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 1.0}
HOSTS = {"head": HEAD, "w1": BIG, "w2": SMALL}


def room(free: float, workers: int = 2, placed: bool = False) -> Room:
    return Room(
        workers=workers,
        need={"CPU": 3.0},
        hosts=HOSTS,
        free={"head": {}, "w1": {"CPU": free}, "w2": {"CPU": 1.0}},
        placed=placed,
    )


def test_the_line_names_what_is_missing_and_what_there_is() -> None:
    assert room(3.0).line(60.0) == (
        "waiting for 3 CPUs on one host for 1 of 2 workers (60 s): "
        "the cluster has 4 CPUs on 2 hosts, 4 CPUs free"
    )
    assert "on one host each for 2 of 2 workers" in room(2.0).line(1.0)
    with_gpu = Room(workers=1, need={"CPU": 2.0, "GPU": 1}, hosts={"w1": BIG}, free={})
    assert with_gpu.line(15.4) == (
        "waiting for 2 CPUs and 1 GPU on one host for a worker (15 s): "
        "the cluster has 3 CPUs and 1 GPU on 1 host, 0 CPUs and 0 GPUs free"
    )


@pytest.mark.parametrize(
    ("free", "workers", "missing"), [(3.0, 1, 0), (3.0, 2, 1), (2.9, 1, 1), (6.0, 2, 0)]
)
def test_a_worker_needs_its_share_on_one_host(free: float, workers: int, missing: int) -> None:
    assert room(free, workers).missing == missing
    assert room(free, workers, placed=True).missing == 0


def test_lines_become_rare_and_the_end_is_told_once() -> None:
    told, watch = list[int](), Waiting()
    for second in range(3600):
        if watch.lines(room(0.0), float(second)):
            told.append(second)
    assert told[:5] == [15, 30, 60, 120, 240]
    assert len(told) < 15
    (end,) = watch.lines(room(3.0, 1), 3600.0)
    assert end == "there is room for the workers after 3600 s; they start"
    assert watch.lines(room(3.0, 1), 3601.0) == []


def test_a_group_that_starts_soon_is_not_told() -> None:
    watch = Waiting()
    lines = [line for second in range(15) for line in watch.lines(room(0.0), float(second))]
    lines += watch.lines(room(9.0, placed=True), 15.0) + watch.lines(room(0.0), 20.0)
    assert lines == []
