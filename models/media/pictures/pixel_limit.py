"""A limit of pixels for one decode, in place of Pillow's limit for the whole process.

Before Pillow allocates a picture it calls `Image._decompression_bomb_check`, whose limit is a
module variable. Setting that variable would change the protection of every other user of Pillow in
the process, and two threads could not have different limits. So the function is wrapped once:
inside `pixel_limit` it uses the limit of the current thread or task, and elsewhere Pillow's own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from PIL import Image

from models.media.pictures.errors import ImageError

_most_pixels: ContextVar[float | None] = ContextVar("most_pixels", default=None)


@contextlib.contextmanager
def pixel_limit(most: float) -> Iterator[None]:
    """Inside this context, pictures of more than `most` pixels raise an ImageError."""
    _wrap_check()
    token = _most_pixels.set(most)
    try:
        yield
    finally:
        _most_pixels.reset(token)


def check_pixels(size: tuple[int, int], most: float) -> None:
    """Raises an ImageError `too_many_pixels` if (width, height) has more than `most` pixels."""
    if size[0] * size[1] > most:
        message = f"{size[0]}x{size[1]} is over the limit of {most:.0f} pixels"
        raise ImageError("too_many_pixels", message)


@functools.cache
def _wrap_check() -> None:
    pillows = Image._decompression_bomb_check

    def check(size: tuple[int, int], **options: Any) -> None:  # the options are Pillow's
        most = _most_pixels.get()
        if most is None:
            pillows(size, **options)
        else:
            check_pixels(size, most)

    # If two threads get here at once, the wrapper is nested, which changes nothing.
    Image._decompression_bomb_check = check
