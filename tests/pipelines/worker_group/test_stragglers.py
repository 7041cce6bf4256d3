"""A worker that is slower than the others is named, once, and what it is slow at."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from pipelines.worker_group.stragglers import (
    PATIENCE,
    WAIT_PATIENCE,
    Hunger,
    Pace,
    Stragglers,
    slowest,
)


def pace(data_s: float = 0.01, forward_s: float = 0.1, step_s: float = 0.4) -> Pace:
    return Pace(host="10.0.0.7 (w7)", data_s=data_s, forward_s=forward_s, step_s=step_s)


def every(seconds: float) -> Callable[[], float]:
    """A clock of which every look finds it later; a reading looks at it once or twice."""
    return itertools.count(0.0, seconds).__next__


def test_equal_workers_are_not_named() -> None:
    watch = Stragglers(every(15))
    for _ in range(3 * PATIENCE):
        metrics, line = watch.read([pace(), pace(forward_s=0.11), pace(data_s=0.02)])
        assert line is None
        assert metrics["straggler_share"] < 0.1


@pytest.mark.parametrize(
    ("slow", "what"),
    [(pace(data_s=0.3), "waiting for data takes it 0.3 s a step, them 0.01 s"),
     (pace(forward_s=0.25), "forward pass takes it 0.25 s a step, them 0.1 s")],
)  # fmt: skip
def test_a_slow_one_is_named_once_after_several_readings(slow: Pace, what: str) -> None:
    watch = Stragglers(every(15))
    told = [watch.read([pace(), pace(), slow])[1] for _ in range(3 * PATIENCE)]
    assert [line is not None for line in told].count(True) == 1
    line = told[PATIENCE - 1]
    assert line is not None
    assert "worker 2 on 10.0.0.7 (w7) is slower" in line
    assert what in line


def test_one_slow_reading_is_not_told_and_a_new_spell_is() -> None:
    watch, slow = Stragglers(every(15)), pace(data_s=0.3)
    readings = [[pace(), slow], [pace(), pace()]] * PATIENCE
    assert all(watch.read(paces)[1] is None for paces in readings)
    for _ in range(2):
        told = [watch.read([pace(), slow])[1] for _ in range(PATIENCE)]
        assert [line is not None for line in told] == [False] * (PATIENCE - 1) + [True]
        watch.read([pace(), pace()])


def test_many_readings_in_a_short_time_are_not_told() -> None:
    """Three readings of two fast steps each may all fall into one breath of another process."""
    watch, slow = Stragglers(every(0.1)), pace(data_s=0.3)
    told = [watch.read([pace(), slow])[1] for _ in range(300)]
    named = [index for index, line in enumerate(told) if line]
    assert len(named) == 1
    assert named[0] + 1 >= 290


def test_a_small_part_of_a_step_does_not_count() -> None:
    share, slow = slowest([pace(data_s=0.001), pace(data_s=0.02)])
    assert slow is None
    assert share == pytest.approx(0.019 / 0.4)


def test_waiting_for_data_is_told_once_and_again_after_it_has_ended() -> None:
    hunger, crowd = Hunger(), lambda: "others hold 6 of 8 CPUs (Serve's Embedder 6)"
    told = [hunger.read(0.7, crowd) for _ in range(3 * WAIT_PATIENCE)]
    assert [line is not None for line in told].index(True) == WAIT_PATIENCE - 1
    assert len([line for line in told if line]) == 1
    assert "waits for data 70% of the time; others hold 6 of 8 CPUs (Serve's Embedder 6)." in str(
        told[WAIT_PATIENCE - 1]
    )
    assert hunger.read(0.1, crowd) is None
    assert [hunger.read(0.7, None) for _ in range(WAIT_PATIENCE)][-1] is not None


def test_a_run_that_is_read_for_in_time_hears_nothing() -> None:
    hunger = Hunger()
    shares = [0.98, 0.7, 0.2, 0.6, 0.6, 0.6, 0.6, 0.1] * 3
    assert all(hunger.read(share, None) is None for share in shares)


def test_a_single_worker_has_nobody_to_be_slower_than() -> None:
    assert Stragglers(every(15)).read([pace(data_s=9)]) == ({}, None)
