"""A small clip encoder's checkpoint and labelled sets to evaluate it on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers.pipelines.clips import segment, write_rows
from helpers.pipelines.evaluation import CLIP_SHAPE as SHAPE
from models.objectives.registry import build_objective
from pipelines.config.data import ClipConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.runs.checkpoints import CheckpointState, save_checkpoint


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    rows = [segment(n) for n in range(36)]
    root = tmp_path_factory.mktemp("labelled")
    return write_rows(root / "train", rows[:24]), write_rows(root / "test", rows[24:])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("runs") / "clips"
    cfg = PretrainConfig(
        model=ModelConfig(encoder="video_micro", **SHAPE),
        clip=ClipConfig(stride=2),
        objective=ObjectiveConfig(name="vjepa", loss="l1"),
        run=RunConfig(name="clips", storage=str(run.parent)),
    )
    torch.manual_seed(1)
    objective = build_objective(
        "vjepa", model=cfg.model_settings, objective=dataclasses.asdict(cfg.objective)
    )
    (run / "checkpoint_0").mkdir(parents=True)
    tensors = {"model": objective.state_dict(), "optimizer": {}, "loop": {}}
    state = CheckpointState(step=30, position=7680, epoch=15.0, manifest_hash="abc")
    save_checkpoint(run / "checkpoint_0", tensors, state, cfg)
    return str(run / "checkpoint_0")
