"""How the size of an encoder's input and the regions it leaves out are written as flags."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

import fsspec
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


NO_REGIONS = "none"
"""Value of a flag of regions that leaves out nothing."""


def read_regions(texts: Sequence[str]) -> tuple[Region, ...]:
    """Reads regions as they are written on the command line.

    Args:
        texts: each is `LEFT,TOP,RIGHT,BOTTOM`, or `FILE:SET`, a set of regions in a TOML file; or
            the only one is `none`.

    Raises:
        ValueError: a text is none of these, or the file has no such set.
    """
    if not texts:
        raise ValueError(f"needs regions, or {NO_REGIONS}")
    if list(texts) == [NO_REGIONS]:
        return ()
    return tuple(region for text in texts for region in _read_regions(text))


def _read_regions(text: str) -> Sequence[Region]:
    sides = text.split(",")
    if len(sides) == 4:
        try:
            left, top, right, bottom = map(float, sides)
        except ValueError as error:
            raise ValueError(f"{text!r}: LEFT,TOP,RIGHT,BOTTOM are four numbers") from error
        return [check_region((left, top, right, bottom))]
    file, colon, name = text.rpartition(":")
    if not colon or not file or not name:
        raise ValueError(f"{text!r} is none of LEFT,TOP,RIGHT,BOTTOM, FILE:SET and {NO_REGIONS}")
    return _read_set(file, name)


def _read_set(file: str, name: str) -> list[Region]:
    """Reads one of the sets of a TOML file, such as `hud_a = [[0.0, 0.0, 1.0, 0.1]]`."""
    try:
        with fsspec.open(file, "rb") as handle:
            sets = tomllib.loads(handle.read().decode())
    except FileNotFoundError as error:
        raise ValueError(f"{file}: there is no such file of regions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    if name not in sets:
        raise ValueError(f"{file} has no set {name!r}; it has {', '.join(sets) or 'none'}")
    try:
        regions = [tuple(float(side) for side in region) for region in sets[name]]
        return [check_region((left, top, right, bottom)) for left, top, right, bottom in regions]
    except (TypeError, ValueError) as error:
        form = "a list of [LEFT, TOP, RIGHT, BOTTOM]"
        raise ValueError(f"{file}: set {name!r} must be {form} ({error})") from error


def _region_texts(regions: tuple[Region, ...] | None) -> list[str]:
    if regions is None:  # those of the encoder
        return ["None"]
    return [",".join(f"{side:g}" for side in region) for region in regions] or [NO_REGIONS]


EXCLUDE_FLAG = tyro.constructors.PrimitiveConstructorSpec[tuple[Region, ...]](
    nargs="*",
    metavar="LEFT,TOP,RIGHT,BOTTOM|FILE:SET|none",
    instance_from_str=read_regions,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=_region_texts,
)
"""Reads regions, in fractions of the picture's width and height; see `read_regions`."""


def checked_regions(flag: str, regions: Sequence[Sequence[float]]) -> tuple[Region, ...]:
    """Returns the regions as tuples, which JSON stores as lists.

    Raises:
        ValueError: one of them is not inside the picture; the flag is named.
    """
    try:
        return tuple(check_region((r[0], r[1], r[2], r[3])) for r in regions)
    except (ValueError, IndexError) as error:
        raise ValueError(f"--{flag}: {error}") from error
