"""Runs the training loop in one process, without the loader and without Ray Train."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from models.keyed_random.arrays import sample_keys
from pipelines.config.data import DataConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.optim import OptimConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig, WatchConfig
from pipelines.loading.masks.maskers import make_masker
from pipelines.runs.checkpoints import load_tensors
from pipelines.runs.run_folder import read_metrics
from pipelines.training.contract import DataSource, SavedCheckpoint, Worker
from pipelines.training.trainer import train

NUM_SAMPLES = 40  # five batches of eight an epoch
TIMED = {"samples_per_s", "data_wait_share", "forward_share", "backward_share"}
TIMED |= {"optimizer_share", "peak_memory_bytes"}


def tiny_config(storage: Path, **run) -> PretrainConfig:
    """A model of about 0.3M weights on 32-pixel images, which takes a few milliseconds a step."""
    run = {"steps": 12, "log_every": 5, "checkpoint_every": 4, "threads": 1, **run}
    return PretrainConfig(
        data=DataConfig(train="memory", batch_size=8, lanes=2),
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8),
        objective=ObjectiveConfig(ema=(0.9, 1.0)),
        optim=OptimConfig(warmup_steps=3),
        watch=WatchConfig(action="off"),
        run=RunConfig(storage=str(storage), **run),
    )


def change(cfg: PretrainConfig, **sections) -> PretrainConfig:
    """Returns `cfg` with fields replaced, as in `change(cfg, run={"steps": 3})`."""
    replaced = {
        name: dataclasses.replace(getattr(cfg, name), **fields) for name, fields in sections.items()
    }
    return dataclasses.replace(cfg, **replaced)


def memory_batches(cfg, *, rank, world_size, start_step, end_step):
    """Synthetic batches with the signature and guarantees of `loading.train_batches`."""
    grid = (cfg.model.image_size // cfg.model.patch_size) ** 2
    per_epoch = NUM_SAMPLES // cfg.data.batch_size
    for step in range(start_step, end_step):
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng([cfg.run.seed, epoch]).permutation(NUM_SAMPLES)
        rows = order[index * cfg.data.batch_size : (index + 1) * cfg.data.batch_size]
        local = cfg.data.batch_size // world_size
        rows = rows[rank * local : (rank + 1) * local]
        made = [_sample(cfg, epoch, int(row), grid) for row in rows]
        images, context, targets = (torch.stack(parts) for parts in zip(*made, strict=True))
        masks = {"context_ids": context, "target_ids": targets}
        ids = [int(row).to_bytes(16, "big") for row in rows]
        keys = sample_keys(ids, cfg.run.seed, epoch)
        if cfg.masks != "blocks":
            drawn = make_masker(cfg).for_samples(keys)
            masks = {name: torch.from_numpy(ids).long() for name, ids in drawn.items()}
        yield {
            "images": images,
            **masks,
            "sample_ids": ids,
            "sample_keys": torch.from_numpy(keys.view(np.int64)),
            "step": step,
        }


def _sample(cfg, epoch, row, grid):
    pixels = np.random.default_rng([7, row]).integers(0, 256, (3, 2, 2), dtype=np.uint8)
    size = cfg.model.image_size
    image = torch.from_numpy(pixels.repeat(size // 2, axis=1).repeat(size // 2, axis=2))
    ids = np.random.default_rng([cfg.run.seed, epoch, row]).permutation(grid)
    parts = np.sort(ids[:6]), np.sort(ids[6:12].reshape(2, 3), axis=1)
    return image, *(torch.from_numpy(part.astype(np.int64)) for part in parts)


MEMORY = DataSource(memory_batches, 5, "memory-hash")


class FolderStore:
    """Checkpoints in a local folder, committed by a rename."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reported = []

    @contextlib.contextmanager
    def latest(self):
        found = sorted(self.folder.glob("checkpoint_*"))
        yield SavedCheckpoint(found[-1], str(found[-1])) if found else None

    def save(self, write, metrics):
        staged = Path(tempfile.mkdtemp(dir=self.folder))
        write(staged)
        staged.rename(self.folder / f"checkpoint_{metrics['step']:08d}")
        self.reported.append(metrics)


def run_training(cfg, folder, data=MEMORY):
    lines = []
    outcome = train(cfg, Worker(), data, FolderStore(folder), lines.append)
    return outcome, lines


def end_of(folder, step=12):
    """The contents of the checkpoint of a step, without timings."""
    checkpoint = folder / f"checkpoint_{step:08d}"
    tensors = {g: load_tensors(checkpoint, g, 1) for g in ("model", "optimizer", "loop")}
    state = json.loads((checkpoint / "state.json").read_text())
    state["metrics"] = {k: v for k, v in state["metrics"].items() if k not in TIMED}
    return tensors, state


def lines_of(cfg):
    path = FolderStore(cfg.run.storage).folder / cfg.run.name / "metrics.jsonl"
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(path)]


def assert_bitwise(ours, theirs):
    assert ours[1] == theirs[1]
    for group, tensors in theirs[0].items():
        assert ours[0][group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(ours[0][group][name], value), f"{group} {name}"
