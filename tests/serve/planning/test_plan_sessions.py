"""What a planner remembers of sessions, and when it forgets them."""

from __future__ import annotations

import numpy as np

from serve.planning.replica.sessions import Session, SessionTable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def session(goal: str = "g", step: int = 1) -> Session:
    rest, expected = np.zeros((3, 2), np.float32), np.zeros(4, np.float32)
    return Session(goal=goal, rest_KA=rest, expected_D=expected, step=step)


def test_one_too_many_crowds_out_the_one_that_was_idle_for_longest() -> None:
    table = SessionTable(2, 100.0, Clock())
    table.keep("a", session())
    table.keep("b", session())
    table.keep("a", session(step=2))  # used again
    table.keep("c", session())
    assert (len(table), table.crowded_out) == (2, 1)
    assert table.find("b", "g") is None
    found = table.find("a", "g")
    assert found is not None
    assert found.step == 2


def test_an_idle_session_is_forgotten_and_a_busy_one_is_not() -> None:
    clock = Clock()
    table = SessionTable(9, 10.0, clock)
    table.keep("idle", session())
    for clock.now in (4.0, 8.0, 12.0):
        table.keep("busy", session())
    assert table.find("idle", "g") is None
    assert table.find("busy", "g") is not None
    assert (len(table), table.crowded_out) == (1, 0)
    clock.now = 30.0
    assert len(table) == 0


def test_another_goal_begins_anew() -> None:
    table = SessionTable(9, 10.0, Clock())
    table.keep("a", session(goal="door"))
    assert table.find("a", "window") is None
    assert table.find("a", "door") is not None
    table.forget("a")
    table.forget("a")
    assert table.find("a", "door") is None
