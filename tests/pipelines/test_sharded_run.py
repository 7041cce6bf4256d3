"""A sharded run on Ray Train: killed, resumed by another number of workers, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.pipelines.fake_training import FolderStore, change
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_manifest
from pipelines.loading.loader import train_batches
from pipelines.loading.plan import make_plan
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import committed_checkpoints, load_objective
from pipelines.training.contract import DataSource, Outcome, Worker
from pipelines.training.launch import pretrain
from pipelines.training.trainer import train

pytestmark = pytest.mark.ray


def config(shards: tuple[str, str], folder: Path, **run: object) -> PretrainConfig:
    settings = {"storage": str(folder), "workers": 2, "cpus_per_worker": 0.25, "threads": 1}
    _, cfg = RECIPES["debug"]
    return change(cfg, data={"train": shards[0], "batch_size": 16}, run={**settings, **run})


def train_here(cfg: PretrainConfig, checkpoints: Path) -> Outcome:
    """Trains the whole model in this process."""
    manifest = read_manifest(cfg.data.train)
    plan = make_plan(manifest.row_groups(), cfg.data, cfg.run.seed)
    data = DataSource(train_batches, plan.batches_per_epoch, manifest.manifest_hash)
    return train(cfg, Worker(), data, FolderStore(checkpoints))


def test_a_sharded_run_is_interrupted_goes_on_whole_and_is_exported(
    cifar_shards: tuple[str, str], tmp_path: Path
) -> None:
    from pipelines.config.jobs import ExportConfig
    from pipelines.export import export

    whole = train_here(config(cifar_shards, tmp_path, name="whole", workers=1), tmp_path / "whole")
    part = config(cifar_shards, tmp_path, name="fsdp", parallel="fsdp", stop_after=5)
    assert pretrain(part).step == 5
    end = pretrain(change(part, run={"stop_after": None}))
    assert end.step == 10
    checkpoints = (end.last_checkpoint, str(tmp_path / "whole" / "checkpoint_00000010"))
    ours, theirs = (load_objective(checkpoint)[0].state_dict() for checkpoint in checkpoints)
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-5
    assert end.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    assert len(committed_checkpoints(end.run_uri)) == 2
    export(ExportConfig(checkpoint=end.run_uri, out=str(tmp_path / "artifact")))
    exported = load_file(tmp_path / "artifact" / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(exported[name], ours[f"target_encoder.{name}"])
