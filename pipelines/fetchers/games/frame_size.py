"""Fits a game's picture into frames of another size."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipelines.fetchers.games.engine import U8


def resize(pixels_HW3: U8, height: int, width: int) -> U8:
    """Resizes a picture to [height, width, 3]; each pixel is the mean of those it covers."""
    picture = Image.fromarray(pixels_HW3)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def broadcast(pixels_HW3: U8, height: int, width: int) -> U8:
    """Puts a picture, squeezed into a square, in the middle of a black frame [height, width, 3].

    Streams show games of another aspect so, with their panels beside the picture.
    """
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    frame = np.zeros((height, width, 3), np.uint8)
    frame[top : top + side, left : left + side] = resize(pixels_HW3, side, side)
    return frame


def parse_size(text: str) -> tuple[int, int]:
    """Reads height and width as `144x256`.

    Raises:
        ValueError: not two even numbers of at least 16.
    """
    sides = [int(part) for part in text.split("x") if part.isdecimal()]
    if len(sides) != 2 or text.count("x") != 1 or any(side < 16 or side % 2 for side in sides):
        raise ValueError(f"--size: two even numbers of at least 16 as in 144x256, got {text!r}")
    return sides[0], sides[1]
