"""Random walks in games: pictures, what was pressed, and where things were.

A walk knows of no goal. It holds each choice for some steps, because a new one at every step would
only tremble on the spot.

Shape suffixes: T frames, A buttons, P places, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from rich.progress import track

from models.keyed_random.arrays import key_of
from pipelines.fetchers.games.engine import U8
from pipelines.ingestion.preparing.mp4 import Mp4Writer, save_array
from pipelines.planning.games.worlds import F32, GAME_WORLDS, Player

RATE = Fraction(10)
"""Nominal frames a second of the videos; one frame is one step, however long that is."""
FRAMES = 101
"""Most frames of a walk."""
STICKY = 0.75
"""Chance that a walk presses the same again."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What happened in one walk."""

    frames_THW3: U8
    actions_TA: F32
    """What was pressed at each frame, and led to the next."""
    places_TP: F32


class HeldChoices:
    """Draws choices that are held for some steps.

    Args:
        count: of choices.
        rng: of the draws.
    """

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self._count, self._rng = count, rng
        self._choice = int(rng.integers(count))

    def __call__(self) -> int:
        """Returns the number of the next choice."""
        if self._rng.random() >= STICKY:
            self._choice = int(self._rng.integers(self._count))
        return self._choice


def walk(player: Player, seed: int, frames: int = FRAMES) -> Walk:
    """Walks at random from where the seed starts, until the episode ends or frames are enough."""
    rng = np.random.default_rng(seed)
    player.reset(int(rng.integers(2**31)))
    choose = HeldChoices(len(player.choices_KA), rng)
    seen: list[U8] = []
    pressed, places = list[F32](), list[F32]()
    goes_on = True
    while goes_on and len(seen) < frames:
        choice = choose()
        seen.append(player.see())
        places.append(player.places())
        pressed.append(player.choices_KA[choice])
        goes_on = player.step(choice)
    return Walk(
        frames_THW3=np.stack(seen), actions_TA=np.stack(pressed), places_TP=np.stack(places)
    )


def walks(env: str, seeds: Sequence[int], frames: int = FRAMES) -> list[Walk]:
    """Walks once for every seed, in one engine."""
    player = GAME_WORLDS[env].start()
    try:
        return [walk(player, seed, frames) for seed in seeds]
    finally:
        player.close()


def walk_seed(seed: int, index: int, *, test: bool) -> int:
    """Returns the seed of walk number `index`, the same however many there are."""
    return int(key_of(seed, index, test) >> np.uint64(1))


def fetch_game_walks(env: str, out: Path, count: int, seed: int, frames: int = FRAMES) -> None:
    """Writes walks as videos with actions and places beside them; those that are there stay.

        OUT/{train,test}/<index>.mp4            one frame a step, 10 a second
        OUT/{train,test}/<index>.actions.npy    float32 [frames, buttons], 0 or 1
        OUT/{train,test}/<index>.states.npy     float32 [frames, places]

    Args:
        env: one of `GAME_WORLDS`.
        out: folder for the files.
        count: walks for training; there are a quarter as many for tests.
        seed: of everything random.
        frames: most frames of a walk.

    Raises:
        FetchError: the engine is not installed.
    """
    player = GAME_WORLDS[env].start()
    try:
        for split, walks_there in (("train", count), ("test", max(count // 4, 1))):
            for index in track(range(walks_there), description=f"{env} {split}"):
                stem = out / split / f"{index:05d}"
                if not stem.with_suffix(".mp4").exists():
                    key = walk_seed(seed, index, test=split == "test")
                    _write(stem, walk(player, key, frames))
    finally:
        player.close()


def _write(stem: Path, found: Walk) -> None:
    """Writes one walk; the video comes last and means "done"."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for name, values in (("actions", found.actions_TA), ("states", found.places_TP)):
        save_array(stem.with_name(f"{stem.name}.{name}.npy"), values)
    writer = Mp4Writer(stem.with_suffix(".mp4"), RATE, crf=4)
    for pixels_HW3 in found.frames_THW3:
        writer.add(pixels_HW3)
    writer.close()
