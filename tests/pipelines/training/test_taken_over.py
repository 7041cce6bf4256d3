"""A run that another job has taken over stops before it writes anything more."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.fake_training import MEMORY, FolderStore, tiny_config
from pipelines.runs.lease import BEAT_ENV, LeaseWatch, held
from pipelines.training.contract import Worker
from pipelines.training.trainer import train


def files_of(folder: Path) -> dict[str, bytes]:
    logs = {"tensorboard"}  # an open file is written out as it is closed
    paths = (p for p in folder.rglob("*") if p.is_file() and not logs & set(p.parts))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.mark.parametrize("read_step", [5, 8])
def test_the_loser_writes_nothing_more(tmp_path: Path, read_step: int) -> None:
    """At step 5 metrics are read, at step 8 a checkpoint is due."""
    cfg = tiny_config(tmp_path, name="run")
    before: list[dict[str, bytes]] = []
    step = [0]

    def batches(cfg, **span):  # type: ignore[no-untyped-def]
        for batch in MEMORY.batches(cfg, **span):
            step[0] = batch["step"] + 1
            if step[0] == read_step:
                before.append(files_of(tmp_path))
            yield batch

    def lost() -> str | None:
        return "process 7 on far" if step[0] >= read_step else None

    data = type(MEMORY)(batches, MEMORY.steps_per_epoch, MEMORY.manifest_hash)
    store = FolderStore(tmp_path / "run")
    outcome = train(cfg, Worker(), data, store, lambda line: None, lost)
    assert (outcome.step, outcome.taken_over) == (read_step, "process 7 on far")
    assert files_of(tmp_path) == before[0]


def test_a_worker_asks_the_lease_at_most_once_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEAT_ENV, "30")
    run = str(tmp_path / "run")
    with held(run, take_over=False, say=print) as lease:
        watch, stranger = LeaseWatch(run, lease.token), LeaseWatch(run, "another")
        assert watch() is None
        assert str(lease.me.pid) in str(stranger())
        assert stranger() is None  # asked a moment ago
