"""How decoded pictures are fitted to the model, and what clients are told about it."""

from __future__ import annotations

import numpy as np

from models.image_size import height_width
from models.media.fit import effect
from models.media.preprocessing import EncoderInput, InputLayout, Preprocessing, input_layout
from serve.ingress.errors import ApiError


def layout_of(size: tuple[int, int], prep: Preprocessing) -> InputLayout:
    """Finds how pictures of one size are fitted.

    Args:
        size: height and width of the picture, pixels.
        prep: the transform, with the regions that are left out.

    Raises:
        ApiError: 400, the regions leave nothing of the picture.
    """
    try:
        return input_layout(*size, prep)
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), param="exclude") from error


def same_patches(one: EncoderInput, other: EncoderInput) -> bool:
    """Whether two pictures have the same grid and keep the same patches of it."""
    if one.pixels.shape != other.pixels.shape:
        return False
    if one.kept is None or other.kept is None:
        return one.kept is other.kept
    return np.array_equal(one.kept, other.kept)


def aspect_warning(size: tuple[int, int], prep: Preprocessing) -> str | None:
    """Says what the fit does to pictures whose aspect differs from the model's.

    Args:
        size: height and width of the picture, pixels.
        prep: the transform.

    Returns:
        A sentence; None if the aspects agree, or if the picture gets a grid of its own.
    """
    told, (high, wide) = effect(prep.fit, *size, prep.image_size), height_width(prep.image_size)
    if told is None:
        return None
    return (
        f"a picture {size[1]} pixels wide and {size[0]} high {told}, because the model's input is "
        f"{wide} wide and {high} high"
    )
