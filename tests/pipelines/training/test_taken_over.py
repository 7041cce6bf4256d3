"""A run that another job has taken over stops before it writes anything more."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from helpers.pipelines.fake_training import MEMORY, FolderStore, change, tiny_config
from helpers.pipelines.loading import write_samples
from pipelines.config.train import PretrainConfig
from pipelines.runs.lease import BEAT_ENV, LeaseWatch, RunInUseError, held
from pipelines.runtime.errors import explain
from pipelines.training import launch
from pipelines.training.contract import Outcome, Worker
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


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """A run that `pretrain` would begin; nothing starts Ray."""
    monkeypatch.setenv(BEAT_ENV, "0.2")
    monkeypatch.setattr(launch, "start_ray", lambda *_, **__: None)
    monkeypatch.setattr(launch, "check_fits", lambda *_: None)
    data = write_samples(tmp_path / "shards")
    return change(tiny_config(tmp_path / "runs", name="run"), data={"train": data})


def test_a_second_command_is_refused_before_ray_starts(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "start_ray", lambda *_, **__: pytest.fail("Ray was started"))
    run = f"{cfg.run.storage}/run"
    with held(run, take_over=False, say=print):
        with pytest.raises(RunInUseError, match="is in use by") as error:
            launch.pretrain(cfg, stream=io.StringIO())
        told = explain(error.value, [])
    assert told is not None
    assert len(told.splitlines()) == 3
    assert "--run.take-over" in told


def test_a_run_is_held_while_it_trains_and_told_when_it_is_taken(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_json = Path(cfg.run.storage) / "run" / "lease.json"
    taking = change(cfg, run={"take_over": True})
    shown = io.StringIO()

    def fit(start, cfg, lease, *_):  # type: ignore[no-untyped-def]
        assert lease_json.exists()
        if cfg.run.take_over:
            raise ValueError("the newer one has the run")
        with pytest.raises(ValueError, match="the newer one has the run"):
            launch.pretrain(taking, stream=shown)
        watch = LeaseWatch(str(lease_json.parent), lease.token)
        assert "has ended since" in str(watch())  # the newer one, and its lease with it
        return Outcome(3, {}, taken_over="process 7 on far")

    monkeypatch.setattr(launch, "_fit_from", fit)
    with pytest.raises(RunInUseError, match="was taken over by process 7 on far"):
        launch.pretrain(cfg, stream=io.StringIO())
    assert "taking over the run from process" in shown.getvalue()
    assert not lease_json.exists()
