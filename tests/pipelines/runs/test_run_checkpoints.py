"""Runs with damaged checkpoints or a damaged list: what errors say, and how to resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.pipelines.fake_training import assert_bitwise, change, end_of, lines_of, tiny_config
from helpers.pipelines.loading import write_samples
from helpers.pipelines.run_folders import (
    LIST,
    MODEL,
    NAMES,
    OF_CHECKPOINT,
    OF_LIST,
    OF_RESUMING,
    copy_run,
    train_run,
)
from pipelines.config.jobs import SweepConfig
from pipelines.runs.checkpoint_format import read_config, read_state, recover_report
from pipelines.runs.checkpoint_list import committed_checkpoints, survey
from pipelines.runs.checkpoints import CheckpointError, load_encoder, resolve_checkpoint
from pipelines.runs.integrity import find_fault
from pipelines.runs.resuming import find_start, go_back
from pipelines.training import recorder

KNN = {4: 0.2, 8: 0.5, 12: 0.3}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of 12 steps with checkpoints at 4, 8 and 12; the one at 8 is the best by kNN."""
    folder = tmp_path_factory.mktemp("whole")
    steps = iter((0.1, *KNN.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "build_probe", lambda cfg, say: lambda objective: next(steps))
        store, _ = train_run(tiny_config(folder, name="a run", probe_every=4))
    return folder / "a run", store


@pytest.fixture
def run(whole_run, tmp_path):
    """A copy of the run, and the configuration that resumes it."""
    return copy_run(whole_run[0], tmp_path)


def _lines(error: pytest.ExceptionInfo[CheckpointError], run: Path) -> list[str]:
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"run {run}: ")
    return lines


@pytest.mark.parametrize("damage", OF_CHECKPOINT | OF_RESUMING)
def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_newest_whole(run, damage):
    folder, _ = run
    harm, reason = (OF_CHECKPOINT | OF_RESUMING)[damage]
    harm(folder / NAMES[2])
    for asked in (None, "newest-whole"):
        start = find_start(str(folder), asked, 4)
        assert (start.name, start.mend) == (NAMES[1], True)
        assert list(start.faults) == [NAMES[2]]
        assert reason in start.faults[NAMES[2]]
    assert find_start(str(folder), NAMES[0], 4).name == NAMES[0]
    with pytest.raises(CheckpointError, match=f"--run.resume-from {NAMES[2]}: ") as error:
        find_start(str(folder), NAMES[2], 4)
    first, second, third = _lines(error, folder)
    assert reason in first
    assert second.startswith(f"Whole: {NAMES[0]}, {NAMES[1]}. Not whole: {NAMES[2]} (")
    assert "Leave --run.resume-from out" in third


@pytest.mark.parametrize("damage", OF_LIST)
def test_a_run_with_a_damaged_list_resumes_from_the_newest_whole_checkpoint(run, damage):
    folder, _ = run
    harm, reason = OF_LIST[damage]
    before = json.loads((folder / LIST).read_text())
    harm(folder / LIST)
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint(str(folder))
    first, second, third = _lines(error, folder)
    assert LIST in first
    assert reason in first
    assert second == f"Whole: {', '.join(NAMES)}. Not whole: none."
    assert "mended by the command that trains the run" in third
    start = find_start(str(folder), None, 4)
    assert (start.name, start.faults, start.mend) == (NAMES[2], {}, True)
    said: list[str] = []
    go_back(start, ranked=True, say=said.append)
    assert len(said) == 1
    assert said[0].startswith(f"going on from {NAMES[2]}: {LIST} written anew (")
    assert reason in said[0]
    assert json.loads((folder / LIST).read_text()) == before


def test_a_list_of_another_ray_is_written_anew(run):
    folder, _ = run
    path = folder / LIST
    values = json.loads(path.read_text())
    del values["current_report_index"]
    path.write_text(json.dumps(values | {"ray_version": "2.99"}))
    assert resolve_checkpoint(str(folder)).endswith(NAMES[1])  # readers need less of it
    start = find_start(str(folder), None, 4)
    assert (start.name, start.mend) == (NAMES[2], True)
    assert start.problem == "written by Ray 2.99, and not readable by this one"


@pytest.mark.parametrize("damage", OF_CHECKPOINT)
def test_reading_a_run_whose_best_checkpoint_is_damaged_is_an_error(run, damage):
    folder, _ = run
    harm, reason = OF_CHECKPOINT[damage]
    assert load_encoder(str(folder))[2]["uri"] == f"{folder}/{NAMES[1]}"
    harm(folder / NAMES[1])
    for uri in (str(folder), f"{folder}/{NAMES[1]}"):  # the run, and that very checkpoint
        with pytest.raises(CheckpointError) as error:
            load_encoder(uri)
        first, second, third = _lines(error, folder)
        assert reason in first
        assert second.startswith(f"Whole: {NAMES[0]}, {NAMES[2]}. Not whole: {NAMES[1]} (")
        assert f"{folder}/checkpoint_<step>" in third
    assert load_encoder(f"{folder}/{NAMES[2]}")[2]["step"] == 12


@pytest.mark.parametrize("damage", OF_RESUMING)
def test_loading_weights_needs_no_whole_optimizer_state(run, damage):
    folder, _ = run
    OF_RESUMING[damage][0](folder / NAMES[1])
    assert load_encoder(str(folder))[2]["step"] == 8


def test_going_back_restores_the_folder_as_it_was_at_the_checkpoint(run, whole_run):
    """The list must be one that Ray Train itself can read."""
    from ray.train import Result

    folder, _ = run
    (folder / NAMES[2] / MODEL).write_bytes(b"")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    said: list[str] = []
    go_back(find_start(str(folder), "newest-whole", 4), ranked=True, say=said.append)
    result = Result.from_path(str(folder))
    assert Path(result.checkpoint.path).name == NAMES[1]
    assert result.metrics == whole_run[1].reported[1]
    listed = json.loads((folder / LIST).read_text())
    assert [r["metrics"] for r in listed["checkpoint_results"]] == whole_run[1].reported[:2]
    assert len(said) == 1
    assert said[0].startswith(f"going on from {NAMES[1]}: {NAMES[2]} ({MODEL} is cut")
    assert said[0].endswith(" moved to set-aside-1")

    # Nothing is gone: moved, or where it was.
    aside = folder / "set-aside-1"
    for path, data in before.items():
        if path.name != LIST:
            place = aside if path.parts[0] == NAMES[2] else folder
            assert (place / path).read_bytes() == data
    assert (aside / "metrics.jsonl").read_bytes() == before[Path("metrics.jsonl")]
    start = find_start(str(folder), None, 4)
    assert (start.name, start.faults, start.mend) == (NAMES[1], {}, False)
    again = find_start(str(folder), "newest-whole", 4)  # may stay on the command line
    assert (again.name, again.faults, again.mend) == (NAMES[1], {}, False)

    go_back(find_start(str(folder), NAMES[0], 4), ranked=True, say=said.append)
    assert (folder / "set-aside-2" / NAMES[1] / MODEL).exists()
    assert [name for name, _ in committed_checkpoints(str(folder))] == [f"{folder}/{NAMES[0]}"]


def test_after_going_back_training_is_bitwise_the_uninterrupted_run(run, whole_run):
    folder, cfg = run
    (folder / NAMES[2] / MODEL).write_bytes(b"")
    go_back(find_start(str(folder), "newest-whole", 4), ranked=False, say=print)
    _, said = train_run(cfg)
    assert "resuming run 'a run' at step 8" in said[0]
    ours, theirs = end_of(folder), end_of(whole_run[0])
    del ours[1]["metrics"]["knn"], theirs[1]["metrics"]["knn"]  # went on without probes
    assert_bitwise(ours, theirs)
    probed = lines_of(tiny_config(whole_run[0].parent, name="a run"))
    losses = [(r["step"], r["loss"]) for r in probed if "loss" in r]
    assert [(r["step"], r["loss"]) for r in lines_of(cfg) if "loss" in r] == losses


def test_the_list_is_ordered_by_score_if_the_best_are_kept_and_holds_the_reports(run, whole_run):
    folder, _ = run
    theirs = json.loads((folder / LIST).read_text())
    (folder / LIST).write_text("")
    go_back(find_start(str(folder), "newest-whole", 4), ranked=True, say=print)
    assert json.loads((folder / LIST).read_text()) == theirs
    names = [r["checkpoint_dir_name"] for r in theirs["checkpoint_results"]]
    assert names == [NAMES[0], NAMES[2], NAMES[1]]  # the test's own run is in that order
    assert resolve_checkpoint(str(folder)).endswith(NAMES[1])
    for name, reported in zip(NAMES, whole_run[1].reported, strict=True):
        checkpoint = folder / name
        assert recover_report(read_state(checkpoint), read_config(checkpoint)) == reported


def test_only_metrics_read_at_the_step_of_the_checkpoint_are_recovered(run):
    folder, _ = run
    state, config = read_state(folder / NAMES[1]), read_config(folder / NAMES[1])
    assert {"loss", "knn"} <= state.metrics.keys()  # of which the loss is of step 5
    assert recover_report(state, config) == {"step": 8, "score": 0.5, "knn": 0.5}
    rarely = change(config, run={"probe_every": 5, "log_every": 4})
    assert recover_report(state, rarely) == {
        "step": 8,
        "score": -1.0,
        "loss": state.metrics["loss"],
    }


def test_a_deleted_older_checkpoint_only_loses_its_entry_in_the_list(run):
    folder, _ = run
    OF_CHECKPOINT["deleted"][0](folder / NAMES[0])
    start = find_start(str(folder), None, 4)
    assert (start.name, start.faults, start.mend) == (NAMES[2], {}, True)
    said: list[str] = []
    go_back(start, ranked=False, say=said.append)
    assert said == [f"going on from {NAMES[2]}: {NAMES[0]} is missing"]
    names = [name for name, _ in committed_checkpoints(str(folder))]
    assert names == [f"{folder}/{NAMES[1]}", f"{folder}/{NAMES[2]}"]


def test_a_damaged_older_checkpoint_is_moved_aside_too(run):
    folder, _ = run
    (folder / NAMES[0] / MODEL).write_bytes(b"")
    (folder / NAMES[2] / MODEL).write_bytes(b"")
    said: list[str] = []
    go_back(find_start(str(folder), None, 4), ranked=False, say=said.append)
    assert f"{NAMES[0]} ({MODEL} is cut" in said[0]
    assert {p.name for p in (folder / "set-aside-1").glob("check*")} == {NAMES[0], NAMES[2]}
    assert [Path(name).name for name, _ in committed_checkpoints(str(folder))] == [NAMES[1]]
    assert not find_start(str(folder), None, 4).mend


def test_an_uploaded_checkpoint_that_was_not_listed_yet_is_used(run):
    folder, _ = run
    uploaded = (folder / NAMES[2]).rename(folder / "elsewhere")
    go_back(find_start(str(folder), None, 4), ranked=False, say=print)
    uploaded.rename(folder / NAMES[2])
    assert [Path(name).name for name, _ in committed_checkpoints(str(folder))] == NAMES[:2]
    start = find_start(str(folder), None, 4)
    assert (start.name, start.mend) == (NAMES[2], True)
    said: list[str] = []
    go_back(start, ranked=False, say=said.append)
    assert said == []
    assert [Path(name).name for name, _ in committed_checkpoints(str(folder))] == NAMES


def test_what_is_left_of_an_upload_that_was_cut_off_is_removed(run):
    folder, _ = run
    for name in ("checkpoint_00000002", "checkpoint_00000016"):
        (folder / name).mkdir()
        (folder / name / MODEL).write_bytes(b"part of it")
    said: list[str] = []
    go_back(find_start(str(folder), None, 4), ranked=False, say=said.append)
    assert len(said) == 1
    assert said[0].endswith(
        "checkpoint_00000016, checkpoint_00000002 removed, whose upload was cut off"
    )
    assert sorted(p.name for p in folder.glob("checkpoint_0*")) == NAMES
    assert not list(folder.glob("set-aside-*"))
    assert not find_start(str(folder), None, 4).mend


def test_a_run_without_a_whole_checkpoint_and_a_run_without_any(run, tmp_path):
    folder, _ = run
    for name in NAMES:
        (folder / name / "state.json").unlink()
    for asked in (None, "newest-whole"):
        with pytest.raises(CheckpointError, match="no checkpoint is whole") as error:
            find_start(str(folder), asked, 4)
        assert "Whole: none." in _lines(error, folder)[1]
    for asked in (None, "newest-whole"):  # a run that has not begun begins
        start = find_start(str(tmp_path / "new"), asked, 4)
        assert (start.name, start.uri, start.mend, start.faults) == (None, None, False, {})
    with pytest.raises(CheckpointError, match="the run has no such checkpoint"):
        find_start(str(tmp_path / "new"), NAMES[0], 4)


def test_a_first_upload_that_was_cut_off_is_no_checkpoint_yet(run):
    folder, _ = run
    (folder / LIST).unlink()
    for name in NAMES[1:]:
        OF_CHECKPOINT["deleted"][0](folder / name)
    (folder / NAMES[0] / "state.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):  # the first would have been step 2's
        find_start(str(folder), None, 2)
    start = find_start(str(folder), None, 4)
    assert start.name is None
    said: list[str] = []
    go_back(start, ranked=False, say=said.append)
    assert said == [f"going on from the beginning: {NAMES[0]} removed, whose upload was cut off"]
    assert not (folder / NAMES[0]).exists()


def test_the_error_has_three_lines_even_with_many_checkpoints(run):
    folder, _ = run
    for step in range(20, 40):
        (folder / f"checkpoint_{step:08d}").mkdir()
    (folder / LIST).write_text("")
    with pytest.raises(CheckpointError) as error:
        find_start(str(folder), "checkpoint_00000020", 4)
    lines = _lines(error, folder)
    assert "Not whole: 16 older, checkpoint_00000036 (state.json is missing)" in lines[1]
    assert len(survey(str(folder))) == 23


def test_resume_from_must_be_the_name_of_a_checkpoint(tmp_path):
    for bad in ("newest", "checkpoint", "checkpoint_5/", "../checkpoint_5", ""):
        with pytest.raises(ValueError, match=r"--run\.resume-from: newest-whole, or"):
            tiny_config(tmp_path, resume_from=bad)
    assert tiny_config(tmp_path, resume_from="checkpoint_5").run.resume_from == "checkpoint_5"


def test_going_back_works_on_s3_as_on_a_disk(run, s3, monkeypatch):
    import s3fs

    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    folder, _ = run
    remote = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    remote.mkdir("damaged")
    (folder / NAMES[2] / MODEL).write_bytes((folder / NAMES[2] / MODEL).read_bytes()[:1000])
    remote.put(str(folder), "damaged/runs/one", recursive=True)
    uri = "s3://damaged/runs/one"
    with pytest.raises(CheckpointError) as error:
        find_start(uri, NAMES[2], 4)
    first, second, _ = str(error.value).splitlines()
    assert first == (
        f"run {uri}: --run.resume-from {NAMES[2]}: {MODEL} is cut or no "
        "safetensors file (1,000 bytes)."
    )
    assert second.startswith(f"Whole: {NAMES[0]}, {NAMES[1]}. Not whole: {NAMES[2]} (")
    with pytest.raises(CheckpointError, match="is not whole"):
        resolve_checkpoint(f"{uri}/{NAMES[2]}")
    go_back(find_start(uri, "newest-whole", 4), ranked=True, say=print)
    moved = {path.rpartition("/")[2] for path in remote.ls("damaged/runs/one/set-aside-1")}
    assert moved == {NAMES[2], "metrics.jsonl"}
    sizes = {Path(p).name: remote.size(p) for p in remote.ls(f"{uri}/set-aside-1/{NAMES[2]}")}
    assert sizes == {p.name: p.stat().st_size for p in (folder / NAMES[2]).iterdir()}
    assert not remote.exists(f"{uri}/{NAMES[2]}")
    start = find_start(uri, None, 4)
    assert (start.uri, start.mend) == (f"{uri}/{NAMES[1]}", False)
    assert resolve_checkpoint(uri) == f"{uri}/{NAMES[1]}"
    remote.pipe_file("damaged/runs/one/" + LIST, b"")
    assert find_start(uri, None, 4).problem == "it is empty"


def test_the_files_of_a_checkpoint_have_the_permissions_of_the_umask(whole_run):
    umask = os.umask(0o022)
    os.umask(umask)
    for path in (whole_run[0] / NAMES[0]).iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_a_whole_checkpoint_has_no_fault(whole_run):
    assert [find_fault(str(whole_run[0] / name)) for name in NAMES] == [None] * 3


def test_a_sweep_refuses_a_damaged_run_of_its_own_before_ray_starts(run, tmp_path, monkeypatch):
    from pipelines import sweep as job

    folder, _ = run
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["train"] == "memory"
    trial = tmp_path / "out" / "runs" / "trial_000"
    trial.parent.mkdir(parents=True)
    folder.rename(trial)
    for name in NAMES:
        (trial / name / MODEL).write_bytes(b"")
    data = write_samples(tmp_path / "shards")
    base = change(tiny_config(tmp_path / "x"), data={"train": data}, run={"storage": "runs"})
    monkeypatch.setattr(job, "start_ray", lambda *a: pytest.fail("Ray was started first"))
    cfg = SweepConfig(space=("optim.lr=0.1",), out=str(tmp_path / "out"))
    with pytest.raises(CheckpointError) as error:
        job.sweep(cfg, change(base, run={"name": "debug"}))
    assert "no checkpoint is whole" in _lines(error, trial)[0]


def test_a_sweep_says_in_a_line_why_a_checkpoint_was_not_read(run):
    from ray.exceptions import RayTaskError

    from pipelines.sweep import _short

    folder, _ = run
    (folder / NAMES[1] / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        load_encoder(str(folder))
    in_task = RayTaskError("_score", "Traceback\n  File x\nCheckpointError: y", error.value)
    for raised in (error.value, in_task, in_task.as_instanceof_cause()):
        assert _short(raised).startswith(f"run {folder}: {NAMES[1]} is not whole: {MODEL} is cut")
