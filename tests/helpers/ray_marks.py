"""The mark `ray`: which tests get it, which process runs them, and a check that none lacks it."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import pytest


@pytest.hookimpl(wrapper=True)  # before `-m` chooses and xdist reads the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """Marks `ray` every test that needs `ray_local`, by whatever fixture it comes.

    Of the two processes that share the suite one gets all of those, so that Ray starts once; the
    other begins with the files that run whole programs, on Rays of their own, which name the group
    `programs`. Of the other tests a file goes to one process, so that the fixtures of a file are
    made once; they come last, in small portions, so that both processes end at the same time.
    """
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("xdist_group") is None:
            group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(group))
    if hasattr(config, "workerinput"):  # a process alone makes the fixtures of a file once
        items.sort(key=_rank)
    yield


def _rank(item: pytest.Item) -> int:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return {"ray": 0, "programs": 1}.get(mark.args[0], 2)


def ray_runs() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@pytest.fixture(autouse=True)
def only_marked_tests_start_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    before = ray_runs()
    yield
    if ray_runs() and not before and request.node.get_closest_marker("ray") is None:
        pytest.fail("this test started Ray and has no mark `ray`")
