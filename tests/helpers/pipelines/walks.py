"""Walks in Two-Rooms: the real trainer learns from some in memory, and shards hold others."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from helpers.pipelines.fake_training import FolderStore
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import hash_bytes
from pipelines.fetchers import two_rooms
from pipelines.recipes.planning import worldmodel_tworooms
from pipelines.training.contract import DataSource, Outcome, Worker
from pipelines.training.trainer import train

WALKS, STEPS = 250, 16


@functools.cache
def walks(seed: int) -> tuple[Tensor, Tensor]:
    """Frames uint8 [walks, 17, 3, 32, 32], and the actions between them."""
    world = TwoRooms()
    places, actions = world.random_walk(WALKS, STEPS, torch.Generator().manual_seed(seed))
    return torch.stack([world.render(one) for one in places]), actions


def walk_batches(
    cfg: PretrainConfig, *, rank: int, world_size: int, start_step: int, end_step: int
) -> Iterator[dict[str, Tensor]]:
    """Windows of the walks, with the signature of `loading.train_batches`; the step fixes them."""
    frames, actions = walks(cfg.run.seed)
    window, size = cfg.clip_frames, cfg.data.batch_size
    for step in range(start_step, end_step):
        generator = torch.Generator().manual_seed(cfg.run.seed * 10**6 + step)
        which = torch.randint(WALKS, (size,), generator=generator).tolist()
        first = torch.randint(STEPS + 2 - window, (size,), generator=generator).tolist()
        pairs = list(zip(which, first, strict=True))
        clips = torch.stack([frames[w, t : t + window] for w, t in pairs]).transpose(1, 2)
        between = torch.stack([actions[w, t : t + window - 1] for w, t in pairs])
        yield {
            "clips": clips,
            "actions": between,
            "sample_ids": [b"%016d" % w for w in which],
            "step": step,
        }


def walk_segment(folder: Path, number: int, frames: int) -> dict:
    """A row of video shards: a walk of so many frames, as `fetch tworooms` writes it."""
    stem = folder / f"{number:05d}"
    with mock.patch.object(two_rooms, "FRAMES", frames):
        two_rooms.write_walk(stem, TwoRooms(), torch.Generator().manual_seed(number))
    return {
        "sample_id": hash_bytes(b"%d" % number),
        "video": stem.with_suffix(".mp4").read_bytes(),
        "num_frames": frames,
        "fps": 10.0,
        "start_s": 0.0,
        "height": 32,
        "width": 32,
        "label": None,
        "source_uri": f"walk-{number}",
        "actions": np.load(f"{stem}.actions.npy").tolist(),
        "states": None,
    }


def walk_config(storage: Path, *, objective: dict | None = None, **run) -> PretrainConfig:
    """The recipe, with other settings of objective and run."""
    base = worldmodel_tworooms()
    return replace(
        base,
        data=replace(base.data, train="memory"),
        objective=replace(base.objective, **(objective or {})),
        optim=replace(base.optim, warmup_steps=min(100, run.get("steps", 100) // 2)),
        watch=replace(base.watch, action="off"),
        run=replace(base.run, storage=str(storage), **run),
    )


def train_on_walks(cfg: PretrainConfig, folder: Path) -> tuple[Outcome, str]:
    """Trains in this process; returns how it ended, and the newest checkpoint."""
    data = DataSource(walk_batches, 7, "walks")
    outcome = train(cfg, Worker(), data, FolderStore(folder), lambda line: None)
    return outcome, str(sorted(folder.glob("checkpoint_*"))[-1])
