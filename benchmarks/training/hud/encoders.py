"""Encoders of the table: pretrained, adapted or untrained, and their features of clips.

Shape suffixes: N clips, C channels, F frames, H and W pixels, K tokens kept, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.encoders.vit import VisionTransformer, build_encoder
from models.media.preprocessing import Preprocessing, normalize
from models.media.regions import Region, kept_patches
from pipelines.config.train import ModelConfig
from pipelines.evaluation.features import pixel_features, preprocessing_of
from pipelines.evaluation.subject import load_subject, random_init
from pipelines.recipes.registry import RECIPES

from .data import Clips, shards
from .jobs import command, once
from .settings import Settings

RECIPE = "levjepa_gameplay"
BATCH = 64
"""Clips of a forward pass."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder and how pixels reach it."""

    network: VisionTransformer
    prep: Preprocessing
    exclude: tuple[Region, ...] = ()

    def features(self, pixels_NCFHW: np.ndarray) -> np.ndarray:
        """Returns the mean of the tokens that show no excluded region, float32 [N, D]."""
        keep_K = _kept_tokens(self.network, self.exclude)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pixels_NCFHW), BATCH):
                x = torch.from_numpy(np.array(pixels_NCFHW[start : start + BATCH]))
                x = normalize(x, self.prep.mean, self.prep.std)
                keep_BK = None if keep_K is None else keep_K.expand(len(x), -1)
                parts.append(self.network(x, keep_BK).mean(1).numpy())
        return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class RawPixels:
    """Stands for an encoder: the features are the pixels, shrunk to 12,288 numbers a clip."""

    prep: Preprocessing

    def features(self, pixels_NCFHW: np.ndarray) -> np.ndarray:
        """Returns normalised pixels, float32 [N, D]."""
        featurize = pixel_features(self.prep)
        parts = torch.from_numpy(np.array(pixels_NCFHW)).split(BATCH)
        return np.concatenate([featurize(part).numpy() for part in parts])


def _kept_tokens(network: VisionTransformer, exclude: Sequence[Region]) -> Tensor | None:
    if not exclude:
        return None
    rows, columns, tubes = network.grid
    height, width = rows * network.patch_size, columns * network.patch_size
    sizes = {"sizes_B2": [(height, width)], "boxes_B4": [(0, 0, width, height)]}
    kept_N = kept_patches(tuple(exclude), **sizes, grids_B2=[(rows, columns)], most=rows * columns)
    return torch.from_numpy(np.flatnonzero(np.tile(kept_N[0], tubes)))


def model(cfg: Settings) -> ModelConfig:
    """Returns the settings of the encoder: the recipe's, with the benchmark's size."""
    base = RECIPES[RECIPE][1].model
    return dataclasses.replace(base, image_size=cfg.size, encoder=cfg.encoder)


def untrained(cfg: Settings, seed: int) -> Encoder:
    """Returns an encoder with random weights."""
    made = model(cfg)
    sizes = ("image_size", "patch_size", "frames", "tubelet", "positions", "patch_std")
    shape = build_encoder(made.encoder, **{name: getattr(made, name) for name in sizes})
    return Encoder(network=random_init(shape, seed), prep=preprocessing_of(made))


def raw_pixels(cfg: Settings) -> RawPixels:
    """Returns the features that need no network."""
    return RawPixels(prep=preprocessing_of(model(cfg)))


def pretrained(
    cfg: Settings,
    name: str,
    seed: int,
    sets: Sequence[str],
    *,
    exclude: tuple[Region, ...] = (),
    extra: Sequence[object] = (),
) -> Encoder:
    """Pretrains an encoder on some sets, in equal shares, or loads it from the work folder.

    Args:
        cfg: the benchmark's settings.
        name: of the run, to which the seed is added.
        seed: of the run.
        sets: names of sets.
        exclude: regions left out, in training and of features.
        extra: further flags of `pipelines.pretrain`.
    """
    first, *mixed = (shards(cfg, part) for part in sets)
    height, width = cfg.size
    flags: list[object] = ["--data.train", first, "--model.image-size", f"{height}x{width}"]
    flags += ["--model.encoder", cfg.encoder, "--model.fit", "squash"]
    flags += ["--data.batch-size", cfg.batch, "--optim.warmup-steps", cfg.steps // 10]
    if mixed:
        shares = [f"{1 / len(sets):.4f}"] * len(mixed)
        flags += ["--data.mix", *mixed, "--data.mix-shares", *shares]
    if exclude:
        flags += ["--model.exclude", *(side for region in exclude for side in region)]
    flags += ["--run.steps", cfg.steps, "--run.checkpoint-every", cfg.steps, *extra]
    return _run(cfg, "pretrain", name, seed, [RECIPE, *flags, "--run.seed", seed], exclude)


def adapted(
    cfg: Settings, name: str, seed: int, old: str, new: str, extra: Sequence[object] = ()
) -> Encoder:
    """Adapts the run `old` of the same seed to the set `new`, or loads what was adapted."""
    where = ("--from", cfg.work / "runs" / f"{old}-s{seed}", "--data.train", shards(cfg, new))
    return _run(cfg, "adapt", name, seed, [*where, "--run.seed", seed, *extra])


def _run(
    cfg: Settings,
    module: str,
    name: str,
    seed: int,
    flags: Sequence[object],
    exclude: tuple[Region, ...] = (),
) -> Encoder:
    run = f"{name}-s{seed}"
    where = ("--run.name", run, "--run.storage", cfg.work / "runs", "--run.threads", 1)

    def train() -> dict[str, Any]:
        log = cfg.work / "logs" / f"{run}.log"
        return command(module, *flags, *where, log=log, niceness=cfg.niceness)

    once(cfg.work / "jobs" / f"{run}.json", train)
    return load(cfg.work / "runs" / run, exclude)


def load(run: Path, exclude: tuple[Region, ...] = ()) -> Encoder:
    """Loads the encoder of a run."""
    subject = load_subject(str(run))
    return Encoder(network=subject.encoder, prep=subject.preprocessing, exclude=exclude)


def features_by_game(encoder: Encoder | RawPixels, part: Clips) -> dict[str, np.ndarray]:
    """Computes the features of every game's clips."""
    features_ND = encoder.features(part.pixels_NCFHW)
    return {str(game): features_ND[part.games_N == game] for game in np.unique(part.games_N)}
