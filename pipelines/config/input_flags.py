"""How the size of an encoder's input and the regions it leaves out are written as flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tyro

from models.image_size import ImageSize, parse_image_size, size_text
from models.media.regions import Region, check_region


def _is_size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and len(value) == 2)


def _read_size(texts: list[str]) -> ImageSize:
    return parse_image_size(texts[0])


SIZE_FLAG = tyro.constructors.PrimitiveConstructorSpec[ImageSize](
    nargs=1,
    metavar="PIXELS|HEIGHTxWIDTH",
    instance_from_str=_read_size,
    is_instance=_is_size,
    str_from_instance=lambda size: [size_text(size)],
)
"""Reads `224` or `144x256`."""


def checked_regions(flag: str, regions: Sequence[Sequence[float]]) -> tuple[Region, ...]:
    """Returns the regions as tuples, which JSON stores as lists.

    Raises:
        ValueError: one of them is not inside the picture; the flag is named.
    """
    try:
        return tuple(check_region((r[0], r[1], r[2], r[3])) for r in regions)
    except (ValueError, IndexError) as error:
        raise ValueError(f"--{flag}: {error}") from error
