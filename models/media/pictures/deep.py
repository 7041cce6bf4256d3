"""Reads pictures of more than 8 bits a channel, of which Pillow drops or clips bits.

Shape suffixes: H, W pixels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps

from models.media.pictures.errors import ImageError
from models.media.pictures.formats import open_picture

DeepRange = int | Literal["auto"]
FULL = 65535
"""Value of white in 16 bits."""
_DIM = 8
"""A picture may have fewer bits than it says if its brightest value is under 1 / 8 of its range."""
# Pillow's unpacker of a sample's low byte, by its unpacker of the high byte.
_LOW_BYTES = {
    f"{bands};16{order}": f"{bands};16{other}"
    for bands in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if np.little_endian else "L"))
}
_TWO_BANDS = "LA;16B"  # has no such unpacker, but can be read as RGBA, which has the same length


@dataclass(frozen=True)
class Levels:
    """A picture in 8 bits a channel.

    Attributes:
        image: of mode L, RGB or RGBA.
        dim: whether its brightest value is under an eighth of the range.
    """

    image: Image.Image
    dim: bool


def grey_levels(image: Image.Image, deep_range: DeepRange) -> Levels:
    """Scales deep grey to 8 bits: 16-bit integers by their range, floating point from [0, 1].

    Args:
        image: loaded, of mode F or one that begins with I.
        deep_range: value of white in 16-bit pictures whose file does not give it.

    Raises:
        ImageError: `unknown_range`, for values outside the range, NaN, and 32-bit or signed
            integers.
    """
    if image.mode == "I" and image.format == "TIFF":
        raise ImageError("unknown_range", "32-bit or signed integers; store 8 or 16 bits")
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        return Levels(Image.fromarray(_scaled(values, 1.0)), dim=False)
    top = _declared(image)
    levels = _integer_levels(values, deep_range if top is None else top, watch=top is None)
    # Pillow inverts TIFFs in which 0 is white only if they have 8 bits.
    negative = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    return Levels(ImageOps.invert(levels.image), levels.dim) if negative else levels


def colour_levels(
    data: bytes, image: ImageFile.ImageFile, raw_mode: str, deep_range: DeepRange
) -> Levels:
    """Scales 16-bit colour to 8 bits: Pillow's high byte, or scaled by another range.

    Args:
        data: the encoded picture.
        image: the same picture, loaded.
        raw_mode: Pillow's name of the way its samples are stored.
        deep_range: as for `grey_levels`.
    """
    if deep_range == FULL:
        high = max(int(top) for _, top in image.getextrema()[:3])  # type: ignore[misc]
        return Levels(image, dim=0 < high < 256 // _DIM)
    values_HWC = deep_values(data, image, raw_mode).astype(np.float64)
    alpha = values_HWC[..., 3:] / FULL * 255.0  # opacity always has the full range
    levels = _integer_levels(values_HWC[..., :3], deep_range, watch=True)
    if not alpha.size:
        return levels
    merged = levels.image.copy()
    merged.putalpha(Image.fromarray(alpha[..., 0].round().astype(np.uint8)))
    return Levels(merged, levels.dim)


def deep_values(data: bytes, image: ImageFile.ImageFile, raw_mode: str) -> npt.NDArray[np.uint16]:
    """Returns all 16 bits of a colour picture, [H, W, C]; decodes it again for the low bytes."""
    high_HWC = np.asarray(image).astype(np.uint16)
    again = open_picture(data)
    if raw_mode == _TWO_BANDS:
        again.tile = [tile._replace(args="RGBA") for tile in again.tile]
        grey, low, alpha, low_alpha = np.moveaxis(np.asarray(again).astype(np.uint16), -1, 0)
        return np.stack([grey << 8 | low] * 3 + [alpha << 8 | low_alpha], axis=-1)
    again.tile = [_low_bytes(tile) for tile in again.tile]
    low_HWC = np.asarray(again).astype(np.uint16)
    both_HWC: npt.NDArray[np.uint16] = high_HWC << np.uint16(8) | low_HWC
    return both_HWC


def raw_mode_of(image: ImageFile.ImageFile) -> str | None:
    """Returns how an unloaded 16-bit colour picture stores samples; None for other pictures."""
    args = image.tile[0].args if image.tile else None
    raw_mode = args[0] if isinstance(args, tuple) and args else args
    known = raw_mode == _TWO_BANDS or raw_mode in _LOW_BYTES
    return raw_mode if known else None  # type: ignore[return-value]


def _low_bytes(tile: ImageFile._Tile) -> ImageFile._Tile:
    if isinstance(tile.args, str):
        return tile._replace(args=_LOW_BYTES[tile.args])
    assert tile.args is not None
    return tile._replace(args=(_LOW_BYTES[tile.args[0]], *tile.args[1:]))


def _declared(image: Image.Image) -> int | None:
    """Returns the value of white if the format gives it, else None."""
    if image.format in ("PPM", "JPEG2000"):  # their readers scale by the maximum in the header
        return FULL
    bits = image.tag_v2.get(258) if image.format == "TIFF" else None  # type: ignore[attr-defined]
    return 4095 if bits == (12,) else None


def _integer_levels(
    values: npt.NDArray[np.float64], deep_range: DeepRange, *, watch: bool
) -> Levels:
    most = float(values.max())
    top = _fitting(most) if deep_range == "auto" else deep_range
    return Levels(Image.fromarray(_scaled(values, top)), dim=watch and 0 < most < (top + 1) / _DIM)


def _fitting(most: float) -> int:
    """Returns the white of the fewest bits, among those of usual sensors, that hold `most`."""
    return next((2**bits - 1 for bits in (8, 10, 12, 14) if most < 2**bits), FULL)


def _scaled(values: npt.NDArray[np.float64], top: float) -> npt.NDArray[np.uint8]:
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN is refused too
        found = f"values from {values.min():g} to {values.max():g}"
        raise ImageError("unknown_range", f"{found}, not within 0 to {top:g}")
    return (values / top * 255.0).round().astype(np.uint8)
