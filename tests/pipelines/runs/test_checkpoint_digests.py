"""Checkpoints with a bit flipped: refused by URI everywhere, and a run goes on from a whole one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from helpers.pipelines.fake_training import MEMORY, assert_bitwise, end_of, tiny_config
from helpers.pipelines.run_folders import MODEL, NAMES, copy_run, split_in_two, train_run
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import CheckpointError, DamagedCheckpointError
from pipelines.runs.checkpoints import load_encoder, load_objective
from pipelines.runs.finished import find_finished
from pipelines.runs.initial_weights import load_initial
from pipelines.runs.integrity import find_fault
from pipelines.runs.resuming import find_start
from pipelines.training import launch
from pipelines.training.contract import Outcome, Worker
from pipelines.training.state import new_state
from pipelines.training.trainer import train

CPU = Worker().device
NO_LEASE: Any = None
FILES = [MODEL, MODEL.replace("model", "optimizer"), MODEL.replace("model", "loop")]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_run(tiny_config(folder, name="a run"))
    return folder / "a run"


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> tuple[Path, PretrainConfig]:
    return copy_run(whole_run, tmp_path)


def flip(path: Path, place: int = -2) -> None:
    """Flips a bit of the last number of a tensor, which safetensors does not notice."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_of_a_tensor_is_refused_as_it_is_loaded(run, file: str) -> None:
    folder, cfg = run
    checkpoint = folder / NAMES[2]
    flip(checkpoint / file)
    assert find_fault(str(checkpoint)) is None  # headers alone do not tell
    state = new_state(cfg, CPU)
    with pytest.raises(DamagedCheckpointError, match="sha256") as caught:
        state.restore(checkpoint, rank=0, world_size=1, uri="s3://bucket/runs/one/c")
    assert str(caught.value).startswith(f"s3://bucket/runs/one/c/{file} is damaged")
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("file", "text", "other"),
    [
        ("state.json", '"step": 12', '"step": 13'),
        ("config.json", '"min_rankme": 2.0', '"min_rankme": 3.0'),
        ("digests-00000-of-00001.json", '"sha256"', '"sha257"'),
    ],
)
def test_a_change_of_a_text_is_found_without_reading_tensors(
    run, file: str, text: str, other: str
) -> None:
    folder, _ = run
    path = folder / NAMES[2] / file
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, other))
    assert "sha256" in str(find_fault(str(folder / NAMES[2])))
    assert find_start(str(folder), None, 4).name == NAMES[1]


def test_weights_that_others_read_are_refused_by_name(run) -> None:
    folder, cfg = run
    uri = f"{folder}/{NAMES[2]}"
    flip(folder / NAMES[2] / MODEL)
    init = tiny_config(folder.parent / "new", init_from=uri)
    for load in (
        lambda: load_encoder(uri),
        lambda: load_objective(uri),
        lambda: load_initial(init, new_state(cfg, CPU).objective),
    ):
        with pytest.raises(CheckpointError, match=f"{uri}/{MODEL} is damaged"):
            load()
    flip(folder / NAMES[2] / "state.json", 5)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        find_finished(uri, "--from")


def test_every_process_writes_the_digests_of_its_own_files(run) -> None:
    folder, cfg = run
    split_in_two(folder / NAMES[2])
    assert find_fault(str(folder / NAMES[2])) is None
    flip(folder / NAMES[2] / "model-00001-of-00002.safetensors")
    with pytest.raises(DamagedCheckpointError, match="model-00001-of-00002"):
        new_state(cfg, CPU).restore(folder / NAMES[2], rank=0, world_size=1)
    (folder / NAMES[2] / "digests-00001-of-00002.json").unlink()
    assert "digests-00001" in str(find_fault(str(folder / NAMES[2])))


def test_a_checkpoint_made_before_there_were_digests_loads(run) -> None:
    folder, cfg = run
    (folder / NAMES[2] / "digests-00000-of-00001.json").unlink()
    assert find_fault(str(folder / NAMES[2])) is None
    assert new_state(cfg, CPU).restore(folder / NAMES[2], rank=0, world_size=1).step == 12


def test_a_run_goes_on_from_the_whole_checkpoint_before_the_damaged_one(
    run, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is that of the run without damage; `_fit` here trains without Ray."""
    folder, cfg = run
    flip(folder / NAMES[2] / FILES[1])
    said: list[str] = []

    def fit(cfg: PretrainConfig, *_: object) -> Outcome:
        from helpers.pipelines.run_folders import RunStore

        return train(cfg, Worker(), MEMORY, RunStore(folder), said.append)

    monkeypatch.setattr(launch, "_fit", fit)
    shown = io.StringIO()
    start = find_start(str(folder), None, 4)
    assert start.name == NAMES[2]
    outcome = launch._fit_from(start, cfg, NO_LEASE, (), shown)
    assert (outcome.step, outcome.refused) == (12, None)
    assert said[0] == "resuming run 'a run' at step 8"
    lines = shown.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"going on from {NAMES[1]}: {NAMES[2]} ({FILES[1]} is damaged")
    assert lines[0].endswith("moved to set-aside-1")
    assert_bitwise(end_of(folder), end_of(whole_run))


def test_a_named_checkpoint_that_is_damaged_is_refused(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    cfg = tiny_config(folder.parent, name="a run", resume_from=NAMES[2])
    damaged = f"{folder}/{NAMES[2]}"
    refused = Outcome(0, {}, refused=f"{damaged}/{MODEL} is damaged.\nmore", damaged=damaged)
    monkeypatch.setattr(launch, "_fit", lambda *_: refused)
    with pytest.raises(CheckpointError, match=f"--run.resume-from {NAMES[2]}: {MODEL} is damaged"):
        launch._fit_from(find_start(str(folder), NAMES[2], 4), cfg, NO_LEASE, (), io.StringIO())
