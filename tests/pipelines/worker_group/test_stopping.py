"""A group that is asked to stop does so right after a checkpoint, and loses no step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.pipelines.fake_training import (
    MEMORY,
    FolderStore,
    assert_bitwise,
    end_of,
    run_training,
    tiny_config,
)
from pipelines.training.contract import Outcome, Worker
from pipelines.training.trainer import train
from pipelines.worker_group.stopping import ask_to_stop, notice_line, stop_request

EVERY_STEP = "0"


@pytest.fixture(autouse=True)
def _ask_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYJEPA_ASK_EVERY_S", EVERY_STEP)


def stopped_at(
    folder: Path, step: int, lost: str | None = None
) -> tuple[Outcome, list[str], list[int]]:
    """Trains; at the question of `step` a stop is asked for, and `lost` has taken the run over."""
    asked: list[int] = []
    lines: list[str] = []

    def reason() -> str | None:
        asked.append(len(asked) + 1)
        return "host 10.0.0.2 goes" if len(asked) >= step else None

    cfg = tiny_config(folder, name="run")
    store = FolderStore(folder / "checkpoints")
    taken = (lambda: lost) if lost else None
    outcome = train(cfg, Worker(), MEMORY, store, lines.append, taken, reason)
    return outcome, lines, asked


@pytest.mark.parametrize("step", [1, 3, 4, 10])
def test_it_stops_after_a_checkpoint_and_goes_on_bitwise(tmp_path: Path, step: int) -> None:
    outcome, lines, asked = stopped_at(tmp_path / "stopped", step)
    assert (outcome.step, outcome.stopped, asked[-1]) == (step, "host 10.0.0.2 goes", step)
    assert lines[-1] == f"stopping after step {step}: host 10.0.0.2 goes"
    names = sorted(p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert names[-1] == f"checkpoint_{step:08d}"
    assert len(names) == len(set(names))
    cfg = tiny_config(tmp_path / "stopped", name="run")
    again, _ = run_training(cfg, tmp_path / "stopped" / "checkpoints")
    whole, _ = run_training(tiny_config(tmp_path / "whole", name="run"), tmp_path / "whole" / "c")
    assert (again.step, whole.step) == (12, 12)
    assert_bitwise(end_of(tmp_path / "stopped" / "checkpoints"), end_of(tmp_path / "whole" / "c"))


def test_at_the_last_step_nobody_is_asked(tmp_path: Path) -> None:
    outcome, _, asked = stopped_at(tmp_path, 12)
    assert (outcome.step, outcome.stopped) == (12, None)
    assert asked == list(range(1, 12))


def test_steps_that_take_no_time_are_not_interrupted_by_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYJEPA_ASK_EVERY_S", "1000")
    _, _, asked = stopped_at(tmp_path, 12)
    assert asked == [1]


def test_a_run_that_was_taken_over_writes_no_checkpoint_before_it_stops(tmp_path: Path) -> None:
    """Step 3 has no reading and no checkpoint of its own, so nobody would have asked the lease."""
    outcome, _, _ = stopped_at(tmp_path, 3, lost="process 7 on far")
    assert (outcome.step, outcome.stopped, outcome.taken_over) == (3, None, "process 7 on far")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_controller_asks_a_process() -> None:
    stop_request.cache_clear()
    assert stop_request().reason is None
    ask_to_stop("there is room")
    assert stop_request().reason == "there is room"
    stop_request.cache_clear()


@pytest.mark.parametrize(
    ("deadline_ms", "when"), [(130_000, " in 30 s"), (None, ""), (90_000, " in 0 s")]
)
def test_the_line_of_a_notice_names_the_host(deadline_ms: int | None, when: str) -> None:
    told = SimpleNamespace(deadline_ms=deadline_ms, preempted_node_ids=["aa"])
    nodes = {"aa": {"NodeManagerAddress": "10.0.0.2"}}
    assert notice_line(told, nodes, 100.0) == f"host 10.0.0.2 is going to be taken away{when}"
