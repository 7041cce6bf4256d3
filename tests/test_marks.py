"""`-m "not ray"` starts no Ray: the mark follows from the fixture, and nothing starts Ray without it."""

from __future__ import annotations

from types import SimpleNamespace

import conftest
import pytest

ON_RAY = {"ray_local", "cifar_shards"}
"""Fixtures that start it."""


class _Item:
    def __init__(self, *fixtures: str) -> None:
        self.fixturenames, self.marks = fixtures, []

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


def test_the_mark_follows_from_the_fixture() -> None:
    items = [_Item("tmp_path", "s3", "ray_local"), _Item("tmp_path", "s3"), SimpleNamespace()]
    conftest.pytest_collection_modifyitems(items)
    assert [getattr(item, "marks", []) for item in items] == [["ray"], [], []]


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
    monkeypatch.setattr(conftest, "_ray_runs", lambda: next(runs))
    guard = conftest._only_marked_tests_start_ray.__wrapped__(request)
    next(guard)
    with pytest.raises(pytest.fail.Exception, match="no mark `ray`"):
        next(guard)
    monkeypatch.undo()
