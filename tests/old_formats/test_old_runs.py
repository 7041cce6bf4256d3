"""Runs and checkpoints that commit ae55864 wrote resume with its losses and can be evaluated."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pipelines.fake_training import TIMED, FolderStore, change
from models.encoders.input_batch import InputBatch
from models.encoders.vit import VisionTransformer
from pipelines.config.jobs import EvaluateConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_manifest
from pipelines.evaluate import evaluate
from pipelines.evaluation.features import encoder_features, preprocessing_of
from pipelines.loading.loader import train_batches
from pipelines.loading.plan import make_plan
from pipelines.runs.checkpoints import (
    CheckpointError,
    committed_checkpoints,
    load_encoder,
    load_tensors,
    read_config,
    read_state,
)
from pipelines.runs.resuming import go_back
from pipelines.training.contract import DataSource, SavedCheckpoint, Worker
from pipelines.training.launch import check_early
from pipelines.training.loggers import read_metrics
from pipelines.training.trainer import train

RUNS = ("ijepa", "vicreg", "hyper", "vjepa")
MIDDLE, END = "checkpoint_00000003", "checkpoint_00000006"
# On the processor that wrote the files the numbers are equal to the bit, but for `hyper`, which two
# processes trained and one resumes.
RTOL, ATOL = 1e-4, 1e-5
UNDETERMINED = {
    "vicreg": {
        *("encoder.norm.bias", "projector.3.bias"),
        *("cosine", "embedded_cosine", "rankme", "embedded_rankme"),
    }
}
"""Weights without any effect on the loss, and what depends on them: a batch norm follows the first,
and the loss ignores a shift of all embeddings. Their gradients are rounding errors, which AdamW
makes as large as any other step, so that they differ a little between processors."""
SHIFTED_RTOL = 1e-3
WATCHED = {"rankme_centred", "std", "cosine"}
"""Readings of the collapse watch that are centred within the rows of each process."""


def config_of(run: Path, shards: Path) -> PretrainConfig:
    """The run's own configuration at the places where its folder and its shards now lie."""
    cfg = read_config(run / MIDDLE)
    data = shards / ("video" if cfg.model.frames > 1 else "train")
    return change(cfg, data={"train": str(data)}, run={"storage": str(run.parent)})


class ListedStore(FolderStore):
    """Finds the newest checkpoint in Ray's list, as the old run has one."""

    @contextlib.contextmanager
    def latest(self) -> Iterator[SavedCheckpoint]:
        uri = committed_checkpoints(str(self.folder))[-1][0]
        yield SavedCheckpoint(Path(uri), uri)


def resume(run: Path, cfg: PretrainConfig) -> None:
    """Goes back to the checkpoint in the middle and trains on, as a worker of `pretrain` does."""
    start = check_early(change(cfg, run={"resume_from": MIDDLE}), str(run)).start
    go_back(start, ranked=False, say=lambda line: None)
    manifest = read_manifest(cfg.data.train)
    plan = make_plan(manifest.row_groups(), cfg.data, cfg.run.seed)
    data = DataSource(train_batches, plan.batches_per_epoch, manifest.manifest_hash)
    said: list[str] = []
    outcome = train(cfg, Worker(), data, ListedStore(run), said.append)
    assert outcome.refused is None
    assert said[0].endswith("at step 3")
    assert outcome.step == 6


def samples_of(run: Path, after: int) -> list[tuple[int, list[str]]]:
    """Which samples the steps of a run's newest attempt were made of, in any order of processes."""
    logs = [(path.stem.rpartition("-")[2], path) for path in run.glob("samples-rank*.jsonl")]
    newest = max(attempt for attempt, _ in logs)
    found: dict[int, list[str]] = {}
    for attempt, path in logs:
        for line in path.read_text().splitlines() if attempt == newest else ():
            row = json.loads(line)
            found.setdefault(row["step"], []).extend(row["ids"])
    return [(step, sorted(ids)) for step, ids in sorted(found.items()) if step > after]


def assert_near(
    found: dict[str, Any], was: dict[str, Any], writers: int, shifted: set[str]
) -> None:
    """Compares two lines of metrics.jsonl, the second one written by so many processes."""
    assert found.keys() - TIMED == was.keys() - TIMED
    for key in found.keys() - TIMED - (WATCHED if writers > 1 else set()):
        rel = SHIFTED_RTOL if key in shifted else RTOL
        assert found[key] == pytest.approx(was[key], rel=rel, abs=ATOL), key


@pytest.mark.usefixtures("ray_local")  # its loader reads shards in tasks of Ray Data
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_with_the_numbers_of_the_uninterrupted_one(
    name: str, old: Path, tmp_path: Path
) -> None:
    whole, run = old / "runs" / name, shutil.copytree(old / "runs" / name, tmp_path / name)
    resume(run, config_of(run, old / "shards"))
    was, found = read_metrics(whole / "metrics.jsonl"), read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[:3] == was[:3]
    writers = read_state(whole / END).world_size
    for ours, theirs in zip(found[3:], was[3:], strict=True):
        assert_near(ours, theirs, writers, UNDETERMINED.get(name, set()))
    assert samples_of(run, 3) == samples_of(whole, 3)
    farthest = 2 * sum(line["lr"] for line in was[3:])  # each goes by a rate a step, either way
    for group in ("model", "optimizer"):
        ours, theirs = load_tensors(run / END, group, 1), load_tensors(whole / END, group, writers)
        assert ours.keys() == theirs.keys()
        for key in ours:
            atol = farthest if key in UNDETERMINED.get(name, set()) else ATOL
            torch.testing.assert_close(ours[key], theirs[key], rtol=RTOL, atol=atol, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_are_listed_and_load(name: str, old: Path, expected: dict[str, Any]) -> None:
    listed = [uri for uri, _ in committed_checkpoints(str(old / "runs" / name))]
    assert [Path(uri).name for uri in listed] == [MIDDLE, END]
    for uri in listed:
        encoder, config, info = load_encoder(uri)
        featurize = encoder_features(encoder.eval(), preprocessing_of(config.model))
        was = expected["runs"][name]["features"][str(info["step"])]
        torch.testing.assert_close(
            featurize(InputBatch(pixels_for(encoder))), torch.tensor(was), rtol=RTOL, atol=ATOL
        )


def pixels_for(encoder: VisionTransformer) -> torch.Tensor:
    """The fixed batch of `write_ae55864.read_runs`."""
    shape = (2, 3, *((encoder.frames,) if encoder.frames > 1 else ()), 16, 16)
    count = torch.tensor(shape).prod()
    return (torch.arange(count) * 7 % 256).to(torch.uint8).reshape(shape)


@pytest.mark.parametrize(("name", "other"), [("ijepa", "vicreg"), ("vicreg", "ijepa")])
def test_an_old_run_evaluates_beside_old_results(
    name: str, other: str, old: Path, tmp_path: Path
) -> None:
    evaluations = old / "evaluations"
    was = json.loads((evaluations / name / "results.json").read_text())
    cfg = EvaluateConfig(
        checkpoint=str(old / "runs" / name),
        data=str(old / "shards" / "train"),
        test=str(old / "shards" / "test"),
        out=str(tmp_path),
        knn_k=5,
        probe_epochs=3,
        compare=(str(evaluations / name), str(evaluations / other / "results.json")),
    )
    found = evaluate(cfg)
    assert found["rows"].keys() == was["rows"].keys()
    for row, values in was["rows"].items():
        assert found["rows"][row]["knn"] == pytest.approx(values["knn"], abs=1 / 12)  # one image
        for rank in ("rankme", "rankme_centred"):
            assert found["rows"][row].get(rank) == pytest.approx(values.get(rank), rel=RTOL)
    assert found["provenance"] == was["provenance"]
    report = (tmp_path / "report.html").read_text()
    assert f"{other}, step 6" in report


def test_another_format_of_a_checkpoint_is_refused(old: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(old / "runs" / "ijepa" / END, tmp_path / END)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_encoder(str(folder))


def test_a_setting_that_is_not_known_is_refused(old: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(old / "runs" / "ijepa" / END, tmp_path / END)
    config = json.loads((folder / "config.json").read_text())
    config["optim"]["sharpness"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="sharpness"):
        load_encoder(str(folder))


def test_an_old_run_crops_as_ever_and_a_new_one_squashes(old: Path, tmp_path: Path) -> None:
    cfg = config_of(old / "runs" / "ijepa", old / "shards")
    assert cfg.model.fit is None  # there was no choice
    ran, new = str(old / "runs" / "ijepa"), str(tmp_path / "new")
    assert check_early(cfg, ran).cfg.model.fit == "crop"
    assert check_early(cfg, new).cfg.model.fit == "squash"
    padded = change(cfg, model={"fit": "pad"})
    assert check_early(padded, new).cfg.model.fit == "pad"
    with pytest.raises(CheckpointError, match=r"--model\.fit was 'crop', is now 'pad'"):
        check_early(padded, ran)
