"""Validation that names the flag at fault."""

from __future__ import annotations

import re
from typing import Literal

NAMED_COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255)}


def require(condition: bool, flag: str, message: str) -> None:
    """Raises ValueError with `message`, headed by the flag, unless `condition` holds."""
    if not condition:
        raise ValueError(f"--{flag}: {message}")


def require_seed(seed: int, flag: str = "seed") -> None:
    """Raises ValueError unless torch, numpy and Python take the seed."""
    require(0 <= seed < 2**60, flag, f"must be between 0 and 2^60, got {seed}")


def require_range(bounds: tuple[float, float], flag: str, low: float, high: float) -> None:
    """Raises ValueError unless `low < bounds[0] <= bounds[1] <= high`."""
    ok = low < bounds[0] <= bounds[1] <= high
    require(ok, flag, f"must satisfy {low} < low <= high <= {high}, got {bounds}")


def parse_colour(flag: str, text: str) -> tuple[int, int, int]:
    """Returns R, G, B of `black`, `white`, `R,G,B` or `#rrggbb`.

    Raises:
        ValueError: the text is none of these; the flag is named.
    """
    if text in NAMED_COLOURS:
        return NAMED_COLOURS[text]
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    parts = re.fullmatch(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*", text)
    red, green, blue = map(int, parts.groups()) if parts else (256, 256, 256)
    require(
        max(red, green, blue) < 256,
        flag,
        f"{text!r} is none of black, white, R,G,B (0 to 255 each) and #rrggbb",
    )
    return red, green, blue


def check_deep_range(flag: str, value: int | Literal["auto"]) -> None:
    """Raises a ValueError that names the flag if white does not fit into 16 bits."""
    ok = value == "auto" or 1 <= int(value) <= 65535
    require(ok, flag, f"must be auto or between 1 and 65535, got {value}")
