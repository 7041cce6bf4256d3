"""How a picture is fitted to the encoder's input: which part of its plane the input shows.

Every fit is a box in the plane of the picture, in pixels, that is stretched over the whole input.
Where the box lies outside the picture, the input shows a plain colour.

Shape suffixes: B pictures, 4 = (left, top, right, bottom), 2 = (height, width).
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from models.image_size import ImageSize, height_width, possible_grids

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

Number = TypeVar("Number", int, float)

Fit = Literal["crop", "pad", "squash", "whole"]
"""How a picture is fitted to the input.

- crop: the largest centred part of the input's aspect; what lies outside is not seen.
- pad: the whole picture, in its own aspect, with plain bars at two sides.
- squash: the whole picture, stretched to the input's aspect.
- whole: the whole picture, in its own aspect, on a grid of its own that has no more tokens than the
  encoder's; positions are interpolated.
"""

ASPECT_TOLERANCE = 0.05
"""Aspects that differ by no more than this count as equal."""


def shown_boxes(
    fit: Fit, sizes_B2: npt.ArrayLike, size: ImageSize, crop_fraction: float = 1.0
) -> F64:
    """Returns the box that the input shows of each picture, float64 [B, 4].

    Args:
        fit: how pictures are fitted.
        sizes_B2: heights and widths of the pictures, pixels.
        size: the encoder's image size.
        crop_fraction: share of the box's sides that is shown, about its centre.
    """
    high_B, wide_B = np.asarray(sizes_B2, np.float64).T
    shown_high_B, shown_wide_B = high_B, wide_B
    if fit in ("crop", "pad"):
        height, width = height_width(size)
        extreme = np.minimum if fit == "crop" else np.maximum
        shown_high_B = extreme(high_B, wide_B / (width / height))
        shown_wide_B = shown_high_B * (width / height)
    shown_high_B, shown_wide_B = shown_high_B * crop_fraction, shown_wide_B * crop_fraction
    left_B, top_B = (wide_B - shown_wide_B) / 2, (high_B - shown_high_B) / 2
    return np.stack([left_B, top_B, left_B + shown_wide_B, top_B + shown_high_B], axis=1)


def grids_of(fit: Fit, boxes_B4: npt.ArrayLike, size: ImageSize, patch_size: int) -> I64:
    """Returns rows and columns of the grid that each box is cut into, int64 [B, 2].

    Args:
        fit: how pictures are fitted; with `whole`, the grid follows the aspect of the box.
        boxes_B4: boxes that are shown.
        size: the encoder's image size. Its tokens are the most that a grid may have.
        patch_size: pixels on a side of a patch.
    """
    boxes = np.asarray(boxes_B4, np.float64)
    rows, columns = (side // patch_size for side in height_width(size))
    if fit != "whole":
        return np.tile(np.array([rows, columns]), (len(boxes), 1))
    grids_G2 = np.array(possible_grids(rows * columns), np.int64)
    aspect_B1 = ((boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0]))[:, None]
    # The rule of `best_grid`; a batch of random crops has nearly as many aspects as samples.
    ratio_BG = grids_G2[:, 0] / grids_G2[:, 1] / aspect_B1
    stretch_BG = np.maximum(ratio_BG, 1 / ratio_BG)
    best_B = np.argmax(grids_G2.prod(axis=1) / (stretch_BG * stretch_BG), axis=1)
    grids_B2: I64 = grids_G2[best_B]
    return grids_B2


def inner_part(
    box: tuple[Number, Number, Number, Number], picture: tuple[int, int], made: tuple[int, ...]
) -> tuple[tuple[Number, Number, Number, Number], slice, slice]:
    """Returns the part of a box that lies inside the picture, and the place that shows it.

    Args:
        box: left, top, right, bottom, in pixels of the picture; overlaps it.
        picture: height and width of the picture.
        made: height and width of the pixels that show the whole box.

    Returns:
        The part, and the rows and columns of the pixels that show it, at least one of each.
    """
    left, top, right, bottom = box
    part = (max(left, 0), max(top, 0), min(right, picture[1]), min(bottom, picture[0]))
    rows = _pixels(part[1] - top, part[3] - top, bottom - top, made[0])
    return part, rows, _pixels(part[0] - left, part[2] - left, right - left, made[1])


def _pixels(start: float, stop: float, length: float, pixels: int) -> slice:
    """Returns the pixels that show [start, stop) of a line of some length; at least one."""
    first = min(round(start * pixels / length), pixels - 1)
    return slice(first, max(first + 1, round(stop * pixels / length)))


def lost_share(fit: Fit, height: int, width: int, size: ImageSize) -> float:
    """Returns the share of a picture's area that its encoder does not see."""
    if fit != "crop":
        return 0.0
    left, top, right, bottom = shown_boxes(fit, [(height, width)], size)[0]
    return 1 - float((right - left) * (bottom - top)) / (height * width)


def stretch(height: int, width: int, size: ImageSize) -> float:
    """Returns by which factor, at least 1, the aspects of a picture and of the input differ."""
    model_height, model_width = height_width(size)
    ratio = (height / width) / (model_height / model_width)
    return max(ratio, 1 / ratio)


def aspects_differ(height: int, width: int, size: ImageSize) -> bool:
    """Whether the aspects differ by more than `ASPECT_TOLERANCE`."""
    return stretch(height, width, size) > 1 + ASPECT_TOLERANCE


def effect(fit: Fit, height: int, width: int, size: ImageSize) -> str | None:
    """Says what a fit does to a picture whose aspect differs from the input's.

    Returns:
        The end of a sentence whose subject is the picture; None if the aspects agree, or if the
        picture gets a grid of its own.
    """
    if fit == "whole" or not aspects_differ(height, width, size):
        return None
    factor = stretch(height, width, size)
    told = {
        "crop": f"is cropped: {lost_share(fit, height, width, size):.0%} of it is not seen",
        "pad": f"is padded: {1 - 1 / factor:.0%} of the input are plain bars",
        "squash": f"is stretched by a factor of {factor:.2f}",
    }
    return told[fit]
