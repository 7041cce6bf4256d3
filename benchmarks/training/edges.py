"""Whether an encoder sees what stands at the edges of wide footage, under each fit.

    python benchmarks/training/edges.py --footage DATA/test/nohud --work WORK

A column with a bar, 8% of the width, is drawn at the left and at the right edge of every frame of
recorded 16:9 footage. How far the bar is filled (one of four levels) is the label. For every fit,
the job pretrains a small encoder for some steps, evaluates it, and prints the linear probe and kNN
beside random weights and the share of the picture that the fit does not show. Chance is 25%.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image

from models.image_size import ImageSize, size_text
from models.media.fit import Fit, lost_share
from models.media.videos import count_frames, decode_frames
from pipelines.config.ingest import IngestConfig
from pipelines.config.jobs import EvaluateConfig
from pipelines.config.train import PretrainConfig
from pipelines.evaluate import evaluate
from pipelines.ingest import ingest
from pipelines.recipes.registry import RECIPES
from pipelines.training.launch import pretrain

U8 = npt.NDArray[np.uint8]

LEVELS = 4
COLUMN = 0.08
"""Width of the column, as a fraction of the frame's."""
EMPTY, FULL = (40, 40, 40), (220, 40, 40)


@dataclass(frozen=True, kw_only=True)
class EdgesConfig:
    """Which footage, and how long to train."""

    footage: Path
    """Folder of 16:9 videos, whose subfolders are searched."""
    work: Path
    """Folder for pictures, shards, runs and evaluations; what is there already is used."""
    videos: int = 60
    """Number of videos; the last fifth are for the test, so that no episode is in both."""
    frames: int = 20
    """Frames taken of each video, evenly spaced."""
    steps: int = 300
    """Steps of pretraining."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and samples."""


ROWS: dict[str, tuple[Fit, ImageSize]] = {
    "crop, square": ("crop", 72),
    "squash, square": ("squash", 72),
    "pad, square": ("pad", 72),
    "rectangle": ("squash", (72, 128)),
    "whole, tokens of the square": ("whole", 72),
}


def draw_bar(frame_HW3: U8, level: int) -> U8:
    """Draws both columns with their bars, filled from below to (level + 1) / LEVELS."""
    drawn, (height, width) = frame_HW3.copy(), frame_HW3.shape[:2]
    wide, top = round(COLUMN * width), round(height * (1 - (level + 1) / LEVELS))
    for side in (slice(0, wide), slice(width - wide, width)):
        drawn[:, side], drawn[top:, side] = EMPTY, FULL
    return drawn


def write_pictures(cfg: EdgesConfig) -> None:
    """Writes WORK/pictures/{train,test}/LEVEL/*.png; the level is random and says nothing else."""
    if (cfg.work / "pictures").exists():
        return
    files = sorted(cfg.footage.rglob("*.mp4"))
    rng = np.random.default_rng(0)
    files = [files[i] for i in rng.permutation(len(files))[: cfg.videos]]
    for number, file in enumerate(files):
        part, data = "train" if number < 0.8 * len(files) else "test", file.read_bytes()
        count = count_frames(data)
        wanted = np.linspace(0, count - 1, min(cfg.frames, count)).astype(int).tolist()
        for index, frame in zip(wanted, decode_frames(data, wanted), strict=True):
            level = int(rng.integers(LEVELS))
            folder = cfg.work / "pictures" / part / str(level)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(draw_bar(frame, level))
            picture.save(folder / f"{number:03d}-{index:05d}.png")


def run_of(cfg: EdgesConfig, row: str, seed: int) -> PretrainConfig:
    """Returns the run of a row: I-JEPA at 8-pixel patches on whole frames."""
    fit, size = ROWS[row]
    base = RECIPES["cifar10_demo"][1]
    name = row.replace(", ", "-").replace(" ", "-")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(
            base.data,
            train=str(cfg.work / "shards" / "train"),
            batch_size=32,
            flip=False,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
        ),
        model=dataclasses.replace(base.model, image_size=size, fit=fit),
        run=dataclasses.replace(
            base.run,
            name=f"{name}-{seed}",
            storage=str(cfg.work / "runs"),
            steps=cfg.steps,
            seed=seed,
            probe_every=0,
            checkpoint_every=cfg.steps,
        ),
    )


def measure(cfg: EdgesConfig, row: str, seed: int) -> dict[str, dict[str, float]]:
    """Trains and evaluates one row; returns its accuracies by encoder and probe."""
    run = run_of(cfg, row, seed)
    out = cfg.work / "evaluations" / run.run.name
    if not (out / "results.json").exists():
        pretrain(run)
        evaluate(
            EvaluateConfig(
                checkpoint=str(cfg.work / "runs" / run.run.name),
                data=str(cfg.work / "shards" / "train"),
                test=str(cfg.work / "shards" / "test"),
                out=str(out),
                seed=seed,
            )
        )
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {
        who: {"linear": rows[who]["linear"]["accuracy"], "knn": rows[who]["knn"]}
        for who in ("encoder", "random_init")
    }


def main(cfg: EdgesConfig) -> None:
    """Prints the table as Markdown."""
    write_pictures(cfg)
    for part in ("train", "test"):
        shards = cfg.work / "shards" / part
        if not shards.exists():
            ingest(IngestConfig(source=str(cfg.work / "pictures" / part), out=str(shards)))
    height, width = np.asarray(Image.open(next((cfg.work / "pictures").rglob("*.png")))).shape[:2]
    print("| fit | input | not shown | linear | random weights | kNN | random weights |")
    print("|---|---|---|---|---|---|---|")
    for row, (fit, size) in ROWS.items():
        found = [measure(cfg, row, seed) for seed in cfg.seeds]
        cells = [
            ", ".join(f"{100 * rows[who][probe]:.1f}" for rows in found)
            for probe in ("linear", "knn")
            for who in ("encoder", "random_init")
        ]
        lost = f"{100 * lost_share(fit, height, width, size):.0f}%"
        print(f"| {row} | {size_text(size)} | {lost} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(EdgesConfig, description=__doc__))
