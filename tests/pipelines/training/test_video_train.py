"""V-JEPA trained with the real loader on synthetic videos, in one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from helpers.pipelines.clips import segment, write_rows
from helpers.pipelines.fake_training import FolderStore, change
from pipelines.config.as_json import from_json, to_json
from pipelines.config.data import ClipConfig, DataConfig, VideoMaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.optim import OptimConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig, WatchConfig
from pipelines.loading.loader import train_batches
from pipelines.runs.checkpoints import load_objective
from pipelines.training.contract import DataSource, Worker
from pipelines.training.trainer import train

STEPS = 4


@pytest.fixture(scope="module")
def shards(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("clips"), [segment(n) for n in range(16)])


def config(shards: str, storage: Path, **run) -> PretrainConfig:
    settings = {"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "threads": 1, **run}
    return PretrainConfig(
        data=DataConfig(train=shards, test=shards, batch_size=8, lanes=2),
        clip=ClipConfig(stride=2),
        video_mask=VideoMaskConfig(
            blocks=(3, 2, 1), scale=(0.2, 0.4, 0.5), temporal_scale=(1,) * 3
        ),
        model=ModelConfig(
            encoder="video_micro",
            image_size=32,
            patch_size=8,
            frames=4,
            tubelet=2,
            positions="rope",
            activation_checkpointing=True,
        ),
        objective=ObjectiveConfig(name="vjepa", loss="l1", ema=(0.9, 1.0)),
        optim=OptimConfig(clip_norm=10.0),
        watch=WatchConfig(action="off"),
        run=RunConfig(storage=str(storage), **settings),
    )


def run(cfg: PretrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    outcome = train(
        cfg, Worker(), DataSource(train_batches, 2, "hash"), FolderStore(folder), lambda line: None
    )
    assert outcome.step == (cfg.run.stop_after or cfg.run.steps)
    newest = sorted(folder.glob("checkpoint_*"))[-1]
    return load_objective(str(newest))[0].state_dict()


@pytest.mark.ray
def test_a_run_on_clips_trains_logs_and_resumes_exactly(shards: str, tmp_path: Path) -> None:
    cfg = config(shards, tmp_path / "whole", probe_every=2)
    whole = run(cfg, tmp_path / "a")
    assert whole["predictor.mask_token"].shape == (3, 1, 48)  # one a generator
    assert whole["predictor.mask_token"].abs().sum(-1).min() > 0  # all trained, from zero
    lines = (tmp_path / "whole" / "run" / "metrics.jsonl").read_text().splitlines()
    readings = [json.loads(line) for line in lines]
    assert {"loss", "loss_0", "loss_1", "loss_2", "rankme", "grad_norm"} <= readings[1].keys()
    assert 0 <= readings[0]["knn"] <= 1

    parts = config(shards, tmp_path / "parts", probe_every=2)
    run(change(parts, run={"stop_after": 2}), tmp_path / "b")
    resumed = run(parts, tmp_path / "b")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_old_configurations_still_load_and_new_ones_come_back_equal(tmp_path: Path) -> None:
    cfg = config("x", tmp_path)
    assert from_json(PretrainConfig, to_json(cfg)) == cfg
    old = json.loads(to_json(PretrainConfig()))
    for section in ("clip", "video_mask"):
        del old[section]
    for field in ("frames", "tubelet", "positions", "activation_checkpointing"):
        del old["model"][field]
    assert from_json(PretrainConfig, json.dumps(old)) == PretrainConfig()


def test_mask_tokens_follow_from_the_generators() -> None:
    assert PretrainConfig().model_settings["mask_tokens"] == 2
    tube = dataclasses.replace(PretrainConfig(), video_mask=VideoMaskConfig(kind="tube"))
    assert tube.model_settings["mask_tokens"] == 1
