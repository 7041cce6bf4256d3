"""Trains the runs of docs/beliefs.md, in memory: small enough for minutes of one CPU core each.

    python benchmarks/beliefs/runs.py --what cifar10 --folder beliefs
    python benchmarks/beliefs/runs.py --what digits --folder beliefs --seed 0
    python benchmarks/beliefs/runs.py --what games --folder beliefs --shards shards/train
    python benchmarks/beliefs/runs.py --what rooms --folder beliefs

`cifar10` is the recipe `cifar10_demo` on all of CIFAR-10, `digits` is `vjepa_occlusion`, and
`games` the same on recorded games at 48 x 80 pixels. `rooms` is `worldmodel_tworooms` on 250 walks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from memory import Draw, cifar10, digit_clips, footage, moving_digits, train_in_memory
from torch import Tensor

from models.planning.worlds.two_rooms import TwoRooms
from pipelines.config.data import ClipConfig
from pipelines.config.train import PretrainConfig
from pipelines.recipes.registry import RECIPES

WALK_STEPS = 16
"""Steps of a random walk in Two-Rooms."""
GAME_FRAMES = 12
"""Frames of a segment that are kept: 1.6 s."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    what: Literal["cifar10", "digits", "games", "rooms"]
    """What it is trained on."""
    folder: Path
    """Takes the run, and the pixels as .npz files."""
    seed: int = 0
    """Of the weights, the batches and the masks."""
    shards: str = ""
    """Games: the shards of `pipelines.fetch gameplay`."""
    steps: int | None = None
    """Steps of the schedule; None takes the recipe's."""


def config(job: Job) -> PretrainConfig:
    """The run's configuration."""
    names = {
        "cifar10": "cifar10_demo",
        "digits": "vjepa_occlusion",
        "games": "vjepa_occlusion",
        "rooms": "worldmodel_tworooms",
    }
    base = RECIPES[names[job.what]][1]
    if job.what == "games":
        size = replace(base.model, image_size=(48, 80), fit="squash", **game_pixels())
        base = replace(base, model=size, clip=ClipConfig(fps=7.5))
    steps = job.steps or {"games": 900}.get(job.what, base.run.steps)
    run = replace(base.run, seed=job.seed, steps=steps, checkpoint_every=500, probe_every=0)
    return replace(base, run=run)


def game_pixels() -> dict[str, tuple[float, float, float]]:
    """Channel statistics of the footage."""
    return {"mean": (0.24, 0.19, 0.165), "std": (0.21, 0.16, 0.175)}


def walks(seed: int, count: int = 250) -> tuple[Tensor, Tensor]:
    """Random walks in Two-Rooms: frames uint8 [N, T, C, H, W], and the actions between them."""
    world = TwoRooms()
    generator = torch.Generator().manual_seed(seed)
    places, actions = world.random_walk(count, WALK_STEPS, generator)
    return torch.stack([world.render(one) for one in places]), actions


def drawing(job: Job, cfg: PretrainConfig) -> tuple[Draw, int]:
    """How batches are drawn, and from how many samples."""
    if job.what == "cifar10":
        images = cifar10(job.folder)["train"]

        def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
            picked = images[torch.from_numpy(rng.integers(len(images), size=count))]
            turned = torch.from_numpy(rng.random(count) < 0.5)[:, None, None, None]
            return {"images": torch.where(turned, picked.flip(-1), picked)}

        return draw, len(images)
    if job.what == "digits":
        grey = moving_digits(job.folder / "digits.npz")["train"]
        last = grey.shape[1] - cfg.clip.stride * (cfg.clip_frames - 1)

        def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
            rows, first = rng.integers(len(grey), size=count), rng.integers(last, size=count)
            clips = digit_clips(grey, torch.from_numpy(rows), torch.from_numpy(first), cfg)
            return {"clips": clips}

        return draw, len(grey)
    if job.what == "rooms":
        frames, actions = walks(job.seed)
        window = cfg.clip_frames

        def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
            rows = rng.integers(len(frames), size=count)
            first = rng.integers(WALK_STEPS + 2 - window, size=count)
            pairs = list(zip(rows, first, strict=True))
            clips = torch.stack([frames[r, f : f + window] for r, f in pairs])
            done = torch.stack([actions[r, f : f + window - 1] for r, f in pairs])
            return {"clips": clips.transpose(1, 2), "actions": done}

        return draw, len(frames)
    clips = footage(job.folder / "games_train.npz", job.shards, cfg, GAME_FRAMES)

    def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        rows = rng.integers(len(clips), size=count)
        first = rng.integers(GAME_FRAMES + 1 - cfg.clip_frames, size=count)
        picked = [clips[r, f : f + cfg.clip_frames] for r, f in zip(rows, first, strict=True)]
        return {"clips": torch.stack(picked).transpose(1, 2)}

    return draw, len(clips)


def main(job: Job) -> None:
    """Trains one run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    cfg = config(job)
    draw, count = drawing(job, cfg)
    print(train_in_memory(cfg, draw, count, job.folder / f"{job.what}-s{job.seed}"))


if __name__ == "__main__":
    main(tyro.cli(Job, description=__doc__))
