"""The aspects of a data set's pictures, and what an encoder's fit does to them.

An encoder has an input of one aspect. Where the pictures have another, its fit crops, pads or
stretches them (`models.media.fit`), and the jobs say so in one line before they begin.

Shape suffixes: N pictures or segments, 2 = (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.image_size import (
    ImageSize,
    best_grid,
    height_width,
    image_size,
    possible_grids,
    size_text,
)
from models.media.fit import Fit, aspects_differ, effect, lost_share
from pipelines.dataset.row_groups import read_row_group
from pipelines.dataset.shards import Manifest
from pipelines.runtime.uris import open_uri

MOST_GROUPS = 8
"""Row groups whose sizes are read: a request for the footer and one for two columns of each."""
FEW = 0.05
"""Share of the pictures that may have another aspect without a word."""
MOST_TERM = 21
"""Largest number in an aspect such as 16:9; others are told as 1.85:1."""
USUAL_PATCHES, USUAL_PATCH = 196, 16
"""Of an input of 224 pixels."""


@dataclass(frozen=True, eq=False)
class Aspects:
    """The sizes of some of a data set's pictures."""

    sizes_N2: npt.NDArray[np.int64]
    """Heights and widths, pixels; at least one picture."""

    @property
    def typical(self) -> tuple[int, int]:
        """Height and width of the picture of the median aspect."""
        return _typical(self.sizes_N2)

    @property
    def uniform(self) -> bool:
        """Whether nearly all pictures have the typical aspect."""
        return self.other_than(image_size(*self.typical)) <= FEW

    def other_than(self, size: ImageSize) -> float:
        """Returns the share of pictures whose aspect differs from that of an input."""
        return float(_differing(self.sizes_N2, size).mean())

    def __str__(self) -> str:
        """Returns the sizes in a few words, width x height."""
        (low_h, low_w), (high_h, high_w) = self.sizes_N2.min(0), self.sizes_N2.max(0)
        high, wide = self.typical
        if (low_h, low_w) == (high_h, high_w):
            return f"{wide}x{high} ({aspect_text(high, wide)})"
        spread = "" if self.uniform else f", median {aspect_text(high, wide)}"
        return f"{low_w}x{low_h} to {high_w}x{high_h}{spread}"


def read_aspects(uri: str, manifest: Manifest) -> Aspects | None:
    """Reads the sizes of a set's pictures from row groups that are spread over it.

    Args:
        uri: folder or `s3://` prefix of the shards.
        manifest: its manifest, or the first shards of it.

    Returns:
        Sizes of a sample; None of an empty set.
    """
    fs, root = open_uri(uri)
    groups = manifest.row_groups()
    places = np.linspace(0, len(groups) - 1, min(MOST_GROUPS, len(groups))).astype(int)
    found = [
        _sizes(fs, root, manifest.shards[groups[place][0]].file, groups[place][1])
        for place in places
    ]
    return Aspects(np.concatenate(found)) if found else None


def _sizes(fs: Any, root: str, file: str, group: int) -> npt.NDArray[np.int64]:
    table = read_row_group(fs, root, file, group, ["height", "width"])
    columns = [table[name].to_numpy().astype(np.int64) for name in ("height", "width")]
    return np.stack(columns, axis=1)


def fit_notes(
    sets: Iterable[tuple[str, str, Manifest]],
    fit: Fit,
    size: ImageSize,
    patch_size: int | None = None,
) -> list[str]:
    """Says what an encoder's fit does to the pictures of data sets.

    Args:
        sets: the flag that names a set, its address and its manifest.
        fit: how the encoder's pictures are fitted.
        size: its image size.
        patch_size: pixels on a side of its patches, if flags of this job decide the fit; None if it
            is that of a finished encoder.

    Returns:
        A line for every different thing to say; none where the aspects agree, or where every
        picture gets a grid of its own.
    """
    flags: dict[str, dict[str, None]] = {}
    for flag, uri, manifest in sets:
        aspects = None if fit == "whole" else read_aspects(uri, manifest)
        if aspects is not None and (told := _fitted(aspects, fit, size, patch_size)):
            flags.setdefault(told, {})[flag] = None
    return [f"note: {', '.join(named)}: {told}" for told, named in flags.items()]


def _fitted(aspects: Aspects, fit: Fit, size: ImageSize, patch_size: int | None) -> str | None:
    differing_N = _differing(aspects.sizes_N2, size)
    share = float(differing_N.mean())
    if share <= FEW:
        return None
    high, wide = _typical(aspects.sizes_N2[differing_N])
    model_high, model_wide = height_width(size)
    advice = "--model.fit and --model.image-size of pretrain decide"
    if patch_size is not None:
        tokens = (model_high // patch_size) * (model_wide // patch_size)
        advice = f"--model.fit decides; {_advice(aspects, tokens, patch_size)}"
    return (
        f"{'the' if share == 1 else f'{share:.0%} of the'} pictures have another aspect than the "
        f"encoder's input, {model_wide} wide and {model_high} high: one {wide} wide and {high} "
        f"high ({aspect_text(high, wide)}) {effect(fit, high, wide, size)}. {advice}"
    )


def ingest_note(aspects: Aspects) -> str | None:
    """Says what a square input may lose of the pictures of a new set.

    Returns:
        A line; None if they are square.
    """
    differing_N = _differing(aspects.sizes_N2, 1)
    if differing_N.mean() <= FEW:
        return None
    high, wide = _typical(aspects.sizes_N2[differing_N])
    return (
        f"note: {lost_share('crop', high, wide, 1):.0%} of a picture {wide} wide and {high} high "
        f"({aspect_text(high, wide)}) are not seen by an encoder with a square input and "
        f"--model.fit crop; {_advice(aspects, USUAL_PATCHES, USUAL_PATCH)}"
    )


def _advice(aspects: Aspects, tokens: int, patch_size: int) -> str:
    """Says which flags show all of the pictures to an encoder of so many tokens a frame."""
    if not aspects.uniform:
        return "squash and pad show all of a picture, whole also keeps its aspect"
    high, wide = aspects.typical
    grids = possible_grids(tokens)
    agreeing = [grid for grid in grids if not aspects_differ(*grid, (high, wide))]
    rows, columns = max(agreeing, key=math.prod, default=best_grid(high, wide, tokens))
    fitting = size_text(image_size(rows * patch_size, columns * patch_size))
    fits = "fits them" if agreeing else "comes closest"
    return f"--model.image-size {fitting} (height x width) {fits}"


def aspect_text(height: int, width: int) -> str:
    """Returns width by height, such as 16:9 or 1.85:1."""
    divisor = math.gcd(height, width)
    terms = width // divisor, height // divisor
    return f"{terms[0]}:{terms[1]}" if max(terms) <= MOST_TERM else f"{width / height:.2f}:1"


def _typical(sizes_N2: npt.NDArray[np.int64]) -> tuple[int, int]:
    order_N = np.argsort(sizes_N2[:, 0] / sizes_N2[:, 1], kind="stable")
    height, width = sizes_N2[order_N[len(order_N) // 2]].tolist()
    return height, width


def _differing(sizes_N2: npt.NDArray[np.int64], size: ImageSize) -> npt.NDArray[np.bool_]:
    """Whether each picture's aspect differs from that of an input; see `aspects_differ`."""
    return np.array([aspects_differ(high, wide, size) for high, wide in sizes_N2.tolist()], bool)
