"""The size of an encoder's input, and the grid of tokens that it is cut into.

Imports neither torch nor numpy, because processes that only read data use it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

ImageSize = int | tuple[int, int]
"""Pixels on a side of a square input, or its height and width if these differ."""


class Grid(NamedTuple):
    """A grid of tokens, numbered by time, then row, then column."""

    rows: int
    columns: int
    tubes: int = 1
    """Time steps; 1 for images."""

    @property
    def per_step(self) -> int:
        """Tokens of one time step."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """All tokens of the grid."""
        return self.tubes * self.per_step

    def __str__(self) -> str:
        return f"{self.tubes} x {self.rows} x {self.columns}"


def height_width(size: ImageSize) -> tuple[int, int]:
    """Returns height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def image_size(height: int, width: int) -> ImageSize:
    """Returns the size as it is stored: one number if it is square."""
    return height if height == width else (height, width)


def as_image_size(value: int | Sequence[int]) -> ImageSize:
    """Reads a size out of JSON, which has lists instead of tuples.

    Raises:
        ValueError: it is neither a whole number nor two of them.
    """
    if isinstance(value, int):
        return value
    if len(value) != 2 or not all(isinstance(side, int) for side in value):
        raise ValueError(f"an image size is one number or height and width, got {value!r}")
    return image_size(*value)


def parse_image_size(text: str) -> ImageSize:
    """Reads `224`, or `144x256` as height and width.

    Raises:
        ValueError: the text has another form.
    """
    found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if not found:
        raise ValueError(f"{text!r} is neither a number of pixels nor HEIGHTxWIDTH")
    height = int(found[1])
    return image_size(height, int(found[2] or height))


def size_text(size: ImageSize) -> str:
    """Returns `224` or `144x256`, as `parse_image_size` reads it."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


@functools.lru_cache(maxsize=4096)
def best_grid(height: float, width: float, tokens: int) -> tuple[int, int]:
    """Chooses rows and columns of square patches for a picture, which keep its aspect.

    Few grids have exactly its aspect. The one taken has the most patches, divided by the square of
    the factor by which its aspect differs from the picture's.

    Args:
        height: height of the picture, in any unit.
        width: width of the picture, in the same unit.
        tokens: most patches, at least 1.

    Returns:
        Rows and columns, at least 1 each.
    """
    aspect = height / width
    return max(possible_grids(tokens), key=lambda g: g[0] * g[1] / _stretch(g, aspect) ** 2)


@functools.lru_cache(maxsize=64)
def possible_grids(tokens: int) -> tuple[tuple[int, int], ...]:
    """Returns rows and columns of every grid of at most `tokens` patches."""
    return tuple((r, c) for r in range(1, tokens + 1) for c in range(1, tokens // r + 1))


def _stretch(grid: tuple[int, int], aspect: float) -> float:
    """Returns by which factor, at least 1, the grid's aspect differs from the picture's."""
    ratio = grid[0] / grid[1] / aspect
    return max(ratio, 1 / ratio)
