"""How sizes of inputs, regions that are left out and numbers of workers are written as flags."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from models.file_systems import read_bytes
from models.image_size import ImageSize, parse_image_size, size_text
from models.media.regions import Region, check_region

Spec = tyro.constructors.PrimitiveConstructorSpec


def size_flag(flag: str, *, optional: bool = False) -> Spec[Any]:
    """Returns how a flag's size is read: `224` or `144x256`.

    Args:
        flag: its name without dashes, for errors.
        optional: whether it may also be None.
    """

    def read(texts: list[str]) -> ImageSize | None:
        if optional and texts == ["None"]:
            return None
        with _naming(flag):
            return parse_image_size(texts[0])

    return Spec(
        nargs=1,
        metavar="PIXELS|HEIGHTxWIDTH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | tuple) or (optional and value is None),
        str_from_instance=lambda size: ["None" if size is None else size_text(size)],
    )


@contextlib.contextmanager
def _naming(flag: str, way_out: str = "") -> Iterator[None]:
    """Names the flag in errors about its value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}{way_out}") from error


NO_REGIONS = "none"
"""Value of a flag of regions that leaves out nothing."""
WAY_OUT = (
    "Give LEFT,TOP,RIGHT,BOTTOM in fractions of the frame (0,0,1,0.1 is its top tenth), FILE:SET "
    f"of a TOML file, or {NO_REGIONS}."
)


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
        raise ValueError(f"{text!r} is neither a region nor FILE:SET")
    return _read_set(file, name)


def _read_set(file: str, name: str) -> list[Region]:
    """Reads one of the sets of a TOML file, such as `hud_a = [[0.0, 0.0, 1.0, 0.1]]`."""
    try:
        sets = tomllib.loads(read_bytes(file).decode())
    except FileNotFoundError as error:
        raise ValueError(f"{file}: there is no such file of regions") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from error
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


def exclude_flag(flag: str) -> Spec[tuple[Region, ...]]:
    """Returns how a flag's regions are read, in fractions of the width and height of the picture.

    Args:
        flag: its name without dashes, for errors.
    """

    def read(texts: list[str]) -> tuple[Region, ...]:
        with _naming(flag, f"\n{WAY_OUT}"):
            return read_regions(texts)

    return Spec(
        nargs="*",
        metavar="LEFT,TOP,RIGHT,BOTTOM|FILE:SET|none",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=_region_texts,
    )


def checked_regions(flag: str, regions: Sequence[Sequence[float]]) -> tuple[Region, ...]:
    """Returns the regions as tuples, which JSON stores as lists.

    Raises:
        ValueError: one of them is not inside the picture; the flag is named.
    """
    with _naming(flag):
        if not all(len(region) == 4 for region in regions):
            raise ValueError(f"a region is LEFT,TOP,RIGHT,BOTTOM, got {regions}")
        return tuple(check_region((r[0], r[1], r[2], r[3])) for r in regions)


Workers = int | tuple[int, int]
"""A number of workers, or the fewest and the most."""


def as_workers(value: int | Sequence[int]) -> Workers:
    """Reads a number of workers out of JSON, which has lists instead of tuples.

    Raises:
        ValueError: it is no number of workers; the flag is named.
    """
    least, most = (value, value) if isinstance(value, int) else tuple(value)
    if not 0 < least <= most:
        raise ValueError(f"--run.workers: must be positive, fewest first; got {least}..{most}")
    return least if least == most else (least, most)


def workers_text(workers: Workers) -> str:
    """Returns a number of workers as it is written on the command line."""
    return str(workers) if isinstance(workers, int) else f"{workers[0]}..{workers[1]}"


def workers_flag(flag: str) -> Spec[Any]:
    """Returns how a flag's number of workers is read: `4`, or `2..8`.

    Args:
        flag: its name without dashes, for errors.
    """

    def read(texts: list[str]) -> Workers:
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", texts[0])
        if not found:
            raise ValueError(f"--{flag}: {texts[0]!r} is neither a number nor FEWEST..MOST")
        return as_workers((int(found[1]), int(found[2] or found[1])))

    return Spec(
        nargs=1,
        metavar="NUMBER|FEWEST..MOST",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | tuple),
        str_from_instance=lambda workers: [workers_text(workers)],
    )
