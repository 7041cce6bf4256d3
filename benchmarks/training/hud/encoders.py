"""Encoders of the table: pretrained, adapted or untrained, and their features of clips.

Shape suffixes: N clips, F frames, H and W pixels, C channels, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from models.encoders.input_batch import InputBatch
from models.encoders.vit import VisionTransformer, build_encoder
from models.media.preprocessing import EncoderInput, Preprocessing, input_layout
from models.media.regions import Region
from pipelines.evaluation.features import (
    Featurizer,
    encoder_features,
    pixel_features,
    preprocessing_of,
)
from pipelines.evaluation.subject import load_subject, random_init

from .data import Clips, clips, shards
from .jobs import command, once
from .settings import HIDDEN, RECIPE, Family, Settings, family_of, model

BATCH = 64
"""Clips of a forward pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A function from clips to features, and the transform that it goes with."""

    name: str
    """Of the folder of its features."""
    featurize: Featurizer
    prep: Preprocessing
    network: VisionTransformer | None = None
    """None for raw pixels."""
    hidden: Mapping[Family, Preprocessing] = field(default_factory=dict)
    """The transforms of games in which other regions are left out than `prep` says."""

    def features(self, pixels_NFHWC: np.ndarray, game: str) -> np.ndarray:
        """Returns the features of whole clips of a game, float32 [N, D]."""
        prep = self.hidden.get(family_of(game), self.prep)
        kept = input_layout(*pixels_NFHWC.shape[2:4], prep).kept
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pixels_NFHWC), BATCH):
                inputs = [EncoderInput(clip, kept) for clip in pixels_NFHWC[start : start + BATCH]]
                parts.append(self.featurize(InputBatch.of(inputs, prep)).numpy())
        return np.concatenate(parts)


def untrained(cfg: Settings, seed: int) -> Encoder:
    """Returns an encoder with random weights."""
    made = model(cfg)
    sizes = ("image_size", "patch_size", "frames", "tubelet", "positions", "patch_std")
    shape = build_encoder(made.encoder, **{name: getattr(made, name) for name in sizes})
    network, prep = random_init(shape, seed), preprocessing_of(made)
    featurize = encoder_features(network, prep)
    return Encoder(name=f"random-s{seed}", featurize=featurize, prep=prep, network=network)


def hiding(encoder: Encoder, variant: str) -> Encoder:
    """Returns the same encoder, to which tokens that show A's or a new HUD are not given."""
    assert encoder.network is not None
    hidden: dict[Family, Preprocessing] = {
        family: dataclasses.replace(encoder.prep, exclude=HIDDEN[family, variant])
        for family in get_args(Family)
    }
    name = f"{encoder.name}-hiding-{variant}"
    return dataclasses.replace(encoder, name=name, hidden=hidden)


def raw_pixels(cfg: Settings) -> Encoder:
    """Returns normalised pixels, shrunk to 12,288 numbers a clip, in the place of features."""
    prep = preprocessing_of(model(cfg))
    return Encoder(name="raw", featurize=pixel_features(prep), prep=prep)


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
        exclude: regions left out, in training and afterwards.
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
        flags += ["--model.exclude", *(",".join(map(str, region)) for region in exclude)]
    flags += ["--run.steps", cfg.steps, "--run.checkpoint-every", cfg.steps, *extra]
    return _run(cfg, "pretrain", name, seed, [RECIPE, *flags, "--run.seed", seed])


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
) -> Encoder:
    run = f"{name}-s{seed}"
    where = ("--run.name", run, "--run.storage", cfg.work / "runs", "--run.threads", 1)

    def train() -> dict[str, Any]:
        log = cfg.work / "logs" / f"{run}.log"
        return command(module, *flags, *where, log=log, prefix=cfg.prefix)

    once(cfg.work / "jobs" / f"{run}.json", train)
    return load(cfg.work / "runs" / run)


def load(run: Path) -> Encoder:
    """Loads the encoder of a run, with the regions that it leaves out."""
    subject = load_subject(str(run))
    network, prep = subject.encoder, subject.preprocessing
    featurize = encoder_features(network, prep)
    return Encoder(name=run.name, featurize=featurize, prep=prep, network=network)


def features_by_game(cfg: Settings, encoder: Encoder, name: str) -> dict[str, np.ndarray]:
    """Computes the features of every game's clips in a set, or reads them from the work folder."""
    part, folder = clips(cfg, name), cfg.work / "features" / encoder.name
    path = folder / f"{name.replace('/', '-')}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(
            partial,
            np.concatenate(
                [
                    encoder.features(part.pixels_NFHWC[rows], game)
                    for game, rows in _by_game(part).items()
                ]
            ),
        )
        partial.replace(path)
    features_ND = np.load(path, mmap_mode="r")
    return {game: features_ND[rows] for game, rows in _by_game(part).items()}


def _by_game(part: Clips) -> dict[str, slice]:
    """Clips are in the order of games."""
    games, firsts, counts = np.unique(part.games_N, return_index=True, return_counts=True)
    return {
        str(game): slice(first, first + count)
        for game, first, count in zip(games, firsts, counts, strict=True)
    }
