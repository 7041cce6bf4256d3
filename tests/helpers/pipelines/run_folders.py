"""Run folders like those of Ray Train (checkpoints, list, metrics), and ways to damage them."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import torch

import pipelines.training.trainer
from helpers.pipelines.fake_training import MEMORY, FolderStore, tiny_config
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import (
    CheckpointState,
    load_tensors,
    read_config,
    read_state,
    save_checkpoint,
)
from pipelines.runs.checkpoints import new_objective
from pipelines.training.contract import SavedCheckpoint, Worker

LIST = "checkpoint_manager_snapshot.json"
NAMES = ["checkpoint_00000004", "checkpoint_00000008", "checkpoint_00000012"]


class RunStore(FolderStore):
    """A run's folder, including the list that Ray Train 2.60 writes."""

    @contextlib.contextmanager
    def latest(self):
        found = sorted(self.folder.glob("checkpoint_0*"))
        yield SavedCheckpoint(found[-1], str(found[-1])) if found else None

    def save(self, write, metrics):
        super().save(write, metrics)
        results = [
            {"version": 0, "checkpoint_dir_name": f"checkpoint_{m['step']:08d}", "metrics": m}
            for m in self.reported
        ]
        order = sorted(range(len(results)), key=lambda i: (self.reported[i]["score"], i))
        listed = {
            "ray_version": "2.60.0",
            "checkpoint_results": [results[i] for i in order],
            "checkpoint_report_indices": order,
            "latest_checkpoint_result": results[-1],
            "pending_training_results": [],
            "pending_validation_specs": [],
            "current_report_index": len(results),
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }
        (self.folder / LIST).write_text(json.dumps(listed))


def save_untrained(cfg: PretrainConfig, folder: Path) -> str:
    """Writes a checkpoint of fresh weights; returns its place."""
    torch.manual_seed(1)
    tensors = {"model": new_objective(cfg).state_dict(), "optimizer": {}, "loop": {}}
    folder.mkdir(parents=True)
    state = CheckpointState(step=30, position=7680, epoch=15.0, manifest_hash="abc")
    save_checkpoint(folder, tensors, state, cfg)
    return str(folder)


def train_run(cfg: PretrainConfig) -> tuple[RunStore, list[str]]:
    """Trains in the run's folder, resuming from its checkpoints."""
    store = RunStore(Path(cfg.run.storage) / cfg.run.name)
    lines: list[str] = []
    outcome = pipelines.training.trainer.train(cfg, Worker(), MEMORY, store, lines.append)
    assert outcome.refused is None, outcome.refused
    return store, lines


def copy_run(run: Path, storage: Path) -> tuple[Path, PretrainConfig]:
    """Copies a run to another storage; returns the folder and the configuration resuming it."""
    shutil.copytree(run, storage / run.name)
    return storage / run.name, tiny_config(storage, name=run.name)


def split_in_two(checkpoint: Path) -> None:
    """Rewrites a checkpoint as two processes would have written it."""
    state, config = read_state(checkpoint), read_config(checkpoint)
    tensors = {g: load_tensors(checkpoint, g, 1) for g in ("model", "optimizer", "loop")}
    for file in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("digests-*")]:
        file.unlink()
    object.__setattr__(state, "world_size", 2)
    for rank in range(2):
        save_checkpoint(checkpoint, tensors, state, config, rank=rank)


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _other_sizes(path: Path) -> None:
    """Replaces a header by one that names other tensors in as many bytes."""
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1))


def _miss_a_share(checkpoint: Path) -> None:
    split_in_two(checkpoint)
    (checkpoint / "loop-00001-of-00002.safetensors").unlink()


MODEL = "model-00000-of-00001.safetensors"
OF_CHECKPOINT = {
    "model cut": (lambda c: _cut(c / MODEL, 1000), f"{MODEL} is cut"),
    "model cut in its data": (lambda c: _cut(c / MODEL, 100_000), f"{MODEL} has 100,000 bytes"),
    "model too long": (lambda c: _lengthen(c / MODEL), f"{MODEL} has "),
    "model of other sizes": (lambda c: _other_sizes(c / MODEL), f"{MODEL} has a damaged header"),
    "model empty": (lambda c: _cut(c / MODEL, 0), f"{MODEL} is cut"),
    "model gone": (lambda c: (c / MODEL).unlink(), f"{MODEL} is missing"),
    "state empty": (lambda c: _cut(c / "state.json", 0), "state.json is empty"),
    "state cut": (lambda c: _cut(c / "state.json", 20), "state.json cannot be read"),
    "state null": (lambda c: (c / "state.json").write_text("null"), "state.json cannot be read"),
    "state gone": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "config cut": (lambda c: _cut(c / "config.json", 30), "config.json cannot be read"),
    "config a list": (lambda c: (c / "config.json").write_text("[]"), "config.json cannot be read"),
    "deleted": (shutil.rmtree, "is missing"),
}
"""Damages that make a checkpoint unusable for every purpose, and what the error says."""
OF_RESUMING = {
    "optimizer cut": (
        lambda c: _cut(c / "optimizer-00000-of-00001.safetensors", 2000),
        "optimizer-00000-of-00001.safetensors is cut",
    ),
    "a share gone": (_miss_a_share, "loop-00001-of-00002.safetensors is missing"),
}
"""Damages that only prevent resuming, because the weights are whole."""
OF_LIST = {
    "empty": (lambda p: p.write_text(""), "it is empty"),
    "cut": (lambda p: _cut(p, 100), "it is damaged"),
    "no object": (lambda p: p.write_text("[]"), "it is damaged"),
    "nothing in it": (lambda p: p.write_text("{}"), "it is damaged"),
    "not text": (lambda p: p.write_bytes(b"\xff\xfe\x00"), "it is damaged"),
    "gone": (lambda p: p.unlink(), "is missing"),
}
"""Damages of Ray Train's list, and what the error says."""
