"""What Ray says is dropped where a user need not read it, said in words where they do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.data
from ray._private.log import PlainRayHandler

from pipelines.runtime.lines.quiet import (
    RESTARTS,
    WORDS,
    NodeLines,
    Reworded,
    quiet_ray,
    stderr_without,
)

NOISE = (
    b"[2026-11-30 00:05:40,622 E 1273 1273] core_worker.cc:2465: Actor with class name: 'MapWorker'"
    b" and ID: '20c0' has constructor arguments in the object store and max_restarts > 0. If ...\n"
)


def record(text: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("ray.data", level, "x.py", 1, text, None, None)


def test_what_a_user_needs_of_ray_data_is_said_once_in_words(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = Reworded()
    full = (
        "Cluster resources are not enough to run any task from TaskPoolMapOperator[x]. It may hang"
    )
    for text in (full, full, "Operator x uses 3 GiB", "x: an actor died during initialization and"):
        assert not said.filter(record(text))
    assert not said.filter(record("Execution plan of Dataset", logging.INFO))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("waiting for a free CPU of the cluster")
    assert lines[1].startswith("WARNING: a worker died as it started")


def test_the_words_are_those_of_the_installed_ray() -> None:
    """Or nothing would be said of them any more."""
    files = ("dataset.py", "_internal/execution/resource_manager.py")
    files += ("_internal/execution/operators/actor_pool_map_operator.py",)
    folder = Path(ray.data.__file__).parent
    lines = (line.strip().strip('f"') for file in files for line in (folder / file).open())
    text = "".join(lines).replace(" ", "")  # of literals that go over several lines
    for theirs in WORDS:
        assert theirs.replace(" ", "") in text, theirs


def test_the_console_of_ray_data_has_the_filter_once() -> None:
    quiet_ray()
    quiet_ray()
    (console,) = (
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, PlainRayHandler)
    )
    assert len([one for one in console.filters if isinstance(one, Reworded)]) == 1


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Prints a line of a node as Ray does."""
    from ray._private import ray_logging, worker

    monkeypatch.setattr(ray_logging.stdout_deduplicator, "skip_re", None)
    quiet_ray()
    data = {"pid": "raylet", "is_err": False}
    return lambda line: worker.print_to_stdstream({**data, "lines": [line]}, ignore_prefix=False)


def test_what_nodes_send_is_dropped_or_said_in_words(
    printed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    printed("WARNING: 4 PYTHON worker processes have been started on node: ab with address: x")
    printed("More than 433 types of tasks seen, this may reduce performance.")
    printed("The node with node id: ab has been marked dead because the detector has missed too")
    printed("A worker died or was killed while executing a task by an unexpected system error.")
    printed("Task ServeController.graceful_shutdown failed. There are infinite retries remaining")
    printed("2 worker(s) were killed due to the node running low on memory. Look at ...")
    printed("something else that nobody has foreseen")
    found = capsys.readouterr()
    assert found.err.splitlines() == [
        "WARNING: a process was lost with a part of the work, which is done again",
        "WARNING: 2 worker(s) were killed due to the node running low on memory",
    ]
    assert found.out.count("\n") == 1
    assert "nobody has foreseen" in found.out


def test_a_training_run_says_itself_that_a_worker_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost = "A worker died or was killed while executing a task by an unexpected system error."
    assert NodeLines(losses=False).search(lost)
    assert capsys.readouterr().err == ""


def test_one_line_of_the_core_is_dropped_and_all_others_pass(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with stderr_without(RESTARTS):
        os.write(2, b"before\n" + NOISE)
        os.write(2, b"ours\n")
        os.write(2, b"without an end")
    os.write(2, b"\nafter\n")
    assert capfd.readouterr().err == "before\nours\nwithout an end\nafter\n"


def test_stderr_is_whole_again_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        with stderr_without(RESTARTS):
            raise KeyError("x")

    with pytest.raises(KeyError):
        job()
    os.write(2, NOISE)
    assert capfd.readouterr().err == NOISE.decode()
