"""The mark `ray` follows from the fixture, and a test that starts Ray without it fails."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from helpers import ray_marks

ON_RAY = {"ray_local", "cifar_shards"}
"""Fixtures that start it."""


class _Item:
    def __init__(self, name: str, *fixtures: str) -> None:
        self.nodeid, self.fixturenames, self.marks = name, fixtures, []

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.mark)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((mark for mark in self.marks if mark.name == name), None)


def test_the_mark_and_the_process_follow_from_the_fixture() -> None:
    items = [_Item("tests/a.py::x", "s3", "ray_local"), _Item("tests/a.py::y", "s3")]
    next(ray_marks.pytest_collection_modifyitems(SimpleNamespace(), items))
    marks = [[(mark.name, mark.args) for mark in item.marks] for item in items]
    assert marks == [
        [("ray", ()), ("xdist_group", ("ray",))],
        [("xdist_group", ("tests/a.py",))],
    ]


def test_what_takes_longest_begins_first_and_files_stay_together() -> None:
    program = _Item("tests/b.py::program", "tmp_path")
    program.add_marker(pytest.mark.xdist_group("programs"))
    others = [_Item(f"tests/{name}", "s3") for name in ("a.py::x", "a.py::y", "c.py::x")]
    items = [*others[:2], program, others[2], _Item("tests/a.py::z", "ray_local")]
    next(ray_marks.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items))
    assert items[0].nodeid == "tests/a.py::z"
    assert items[1:] == [program, *others]


def test_the_processes_know_which_tests_belong_together(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs everything")
    assert request.node.nodeid.endswith("@tests/repository/test_marks.py")


def test_every_collected_test_on_ray_has_the_mark(request: pytest.FixtureRequest) -> None:
    without = [
        item.nodeid
        for item in request.session.items
        if ON_RAY & set(getattr(item, "fixturenames", ())) and not item.get_closest_marker("ray")
    ]
    assert without == []


def test_a_test_that_starts_ray_unmarked_fails(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("ray") is not None:
        pytest.fail("this test itself must have no mark")
    runs = iter((False, True))
    monkeypatch.setattr(ray_marks, "ray_runs", lambda: next(runs))
    guard = ray_marks.only_marked_tests_start_ray.__wrapped__(request)
    next(guard)
    with pytest.raises(pytest.fail.Exception, match="no mark `ray`"):
        next(guard)
    monkeypatch.undo()
