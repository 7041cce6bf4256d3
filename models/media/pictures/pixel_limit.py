"""Our limit of pixels in place of Pillow's, for this decode alone.

Pillow asks one function, `Image._decompression_bomb_check`, before it makes room for a picture, and
that function knows one limit a process, a module's variable. Setting it would change what every
other user of Pillow in the process is protected from, and two threads could not have two limits.
So the function is wrapped once: inside `pixel_limit` it asks the limit of the thread (or task) that
decodes, elsewhere it is Pillow's own.
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
    """While it lasts, pictures of more than `most` pixels raise ImageError, and no others do."""
    _wrap_check()
    token = _most_pixels.set(most)
    try:
        yield
    finally:
        _most_pixels.reset(token)


def check_pixels(size: tuple[int, int], most: float) -> None:
    """Raises an ImageError `too_many_pixels` for a (width, height) of more than `most` pixels."""
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

    # Two threads that come here at once nest the wrapper, which changes nothing.
    Image._decompression_bomb_check = check
