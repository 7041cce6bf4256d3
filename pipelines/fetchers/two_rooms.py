"""Random walks in Two-Rooms as video with the action of every frame.

    OUT/{train,test}/<index>.mp4            32 x 32 pixels, 10 frames a second
    OUT/{train,test}/<index>.actions.npy    float32 [frames, 2], wanted displacement in pixels
    OUT/{train,test}/<index>.states.npy     float32 [frames, 2], place of the point in pixels

Row t holds the place that frame t shows and the action taken there; after the last frame's action
nothing is shown any more. The walk knows nothing of any goal. The world itself is
`models.planning.worlds.two_rooms`.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from models.keyed_random.arrays import key_of
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.ingestion.preparing.mp4 import Mp4Writer, save_array

RATE = Fraction(10)
FRAMES = 17
"""Frames of a walk; 16 transitions."""


def fetch_tworooms(out: Path, walks: int, seed: int) -> None:
    """Writes `walks` walks for training and a quarter as many for tests; those there stay.

    Walk number n is the same however many are asked for.

    Args:
        out: folder for the files.
        walks: how many for training.
        seed: of everything random.
    """
    for split, count in (("train", walks), ("test", max(walks // 4, 1))):
        for index in track(range(count), description=f"tworooms {split}"):
            stem = out / split / f"{index:05d}"
            if not stem.with_suffix(".mp4").exists():
                key = int(key_of(seed, index, split == "test") >> np.uint64(1))
                write_walk(stem, TwoRooms(), torch.Generator().manual_seed(key))


def write_walk(stem: Path, world: TwoRooms, generator: torch.Generator) -> None:
    """Writes one walk; the video comes last and means "done"."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    places_1T2, actions_1T2 = world.random_walk(1, FRAMES, generator)
    places_T2 = places_1T2[0, :FRAMES]
    for name, values_T2 in (("actions", actions_1T2[0]), ("states", places_T2)):
        save_array(stem.with_name(f"{stem.name}.{name}.npy"), values_T2.numpy())
    writer = Mp4Writer(stem.with_suffix(".mp4"), RATE, crf=0)
    for pixels_3HW in world.render(places_T2):
        writer.add(pixels_3HW.permute(1, 2, 0).numpy())
    writer.close()
