"""Converts pictures with an embedded ICC profile to sRGB.

The intent is relative colorimetric with black point compensation: white stays white, and black
stays black. Profiles that mean sRGB are recognised by their effect, not their name, and pixels are
then unchanged bit for bit.
"""

from __future__ import annotations

import functools
import io
import itertools

import numpy as np
from PIL import Image, ImageCms

from models.media.pictures.metadata import MOST_PROFILE_BYTES, icc_profile

# The colour space of a usable profile, by the mode of the picture; others are ignored.
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_SAME = 2
"""Largest difference in levels between profiles for sRGB, which round its curve differently."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts a picture to sRGB.

    Args:
        image: of mode RGB, L or CMYK.
        profile: the embedded profile. None, a damaged one, and one for another number of channels
            change nothing.

    Returns:
        The picture in RGB.
    """
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "L":
        return image.point(np.asarray(transform.apply(_ramp()))[0, :, 1].tolist()).convert("RGB")
    return transform.apply(image)


def is_of_other_colours(data: bytes) -> bool:
    """Whether an 8-bit grey or RGB file, PNG or JPEG, embeds a profile that is not sRGB."""
    profile = icc_profile(data)
    return changes_colours(profile, "RGB") or changes_colours(profile, "L")


def changes_colours(profile: bytes | None, mode: str) -> bool:
    """Whether `to_srgb` would change the colours of a picture of this mode."""
    return bool(profile) and _transform(profile, mode) is not None


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform of pictures of `mode` to sRGB, or None if nothing changes."""
    if len(profile) > MOST_PROFILE_BYTES or mode not in _SPACES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # damaged, so ignored
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    before = _ramp() if mode == "L" else _colours()
    after = np.asarray(transform.apply(before), dtype=np.int16)
    moved = np.abs(after - np.asarray(before.convert("RGB"), dtype=np.int16))
    return int(moved.max()) <= _SAME


def _ramp() -> Image.Image:
    """Returns a picture of every level of grey."""
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def _colours() -> Image.Image:
    """Returns a picture of a grid of colours, 18 levels a channel, and of every grey."""
    grid = list(itertools.product(range(0, 256, 15), repeat=3))
    greys = [(level, level, level) for level in range(256)]
    return Image.fromarray(np.array([grid + greys], dtype=np.uint8))
