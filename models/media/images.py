"""Decodes encoded image bytes to an upright RGB picture; defines what the project's pixels are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from models.media.pictures.colour import changes_colours, to_srgb
from models.media.pictures.deep import (
    FULL,
    DeepRange,
    Levels,
    colour_levels,
    deep_values,
    grey_levels,
)
from models.media.pictures.deep import raw_mode_of as deep_raw_mode
from models.media.pictures.errors import ImageError
from models.media.pictures.formats import open_picture, refusal
from models.media.pictures.metadata import ORIENTATION, icc_profile, without_metadata
from models.media.pictures.pixel_limit import check_pixels, pixel_limit

MAX_PIXELS = 100_000_000
"""Default limit for one image."""
Rgb = tuple[int, int, int]
BLACK: Rgb = (0, 0, 0)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes a picture upright, by its EXIF orientation."""


@dataclass(frozen=True)
class Decoded:
    """A decoded picture, and facts about its bytes.

    Attributes:
        image: upright, RGB, in sRGB, without metadata.
        encoded: the bytes that were decoded: those given, or the same picture without metadata that
            could not be read.
        format: Pillow's name of the encoding.
        plain: whether any decoder gets these pixels from `encoded`, because it is 8-bit RGB or
            grey, upright, opaque, in sRGB, and a single frame.
        dim: whether it is a 16-bit picture whose brightest value is under an eighth of its range.
    """

    image: Image.Image
    encoded: bytes
    format: str
    plain: bool
    dim: bool


def open_image(data: bytes, *, max_pixels: int | None = MAX_PIXELS) -> ImageFile.ImageFile:
    """Reads the header of an encoded image and checks its size, without decoding pixels.

    Raises:
        ImageError: `empty`, `not_an_image`, `too_many_pixels`, or the header is damaged.
    """
    most = math.inf if max_pixels is None else max_pixels
    with pixel_limit(most):
        try:
            return _open(data, most)
        except ImageError as error:
            return _open(_bare(data, error), most)


def decode_image(
    data: bytes,
    *,
    max_pixels: int | None = MAX_PIXELS,
    draft: tuple[int, int] | None = None,
    background: Rgb = BLACK,
    deep_range: DeepRange = FULL,
) -> Image.Image:
    """Decodes JPEG, PNG, WebP and the other `formats.FORMATS` into an upright RGB image.

    EXIF rotation is applied, colours with an embedded profile are converted to sRGB, transparent
    places show the background, CMYK is converted, and the first frame of an animation is taken.
    Metadata that is damaged or too long is ignored. Deep greyscale is scaled by its type's range: 0
    to 65535 for 16 bits, 0 to 1 for floating point. Values outside are refused as `unknown_range`,
    and so are 32-bit and signed integers, which have no common range (they may be photographs,
    counts or heights).

    Args:
        data: the encoded bytes.
        max_pixels: refuse larger images before decoding them; None decodes any.
        draft: for JPEG, decode at a reduced scale not smaller than this (width, height), which
            saves most of the work when a large picture is made small.
        background: colour that shows through transparent places.
        deep_range: the value of white in 16-bit images whose file does not give it, such as 4095
            for 12-bit data. "auto" takes the white of the fewest bits (8, 10, 12, 14 or 16) that
            hold the image's brightest value.

    Raises:
        ImageError: the image cannot be used, even if part of it could be decoded.
    """
    return read_image(
        data, max_pixels=max_pixels, draft=draft, background=background, deep_range=deep_range
    ).image


def read_image(
    data: bytes,
    *,
    max_pixels: int | None = MAX_PIXELS,
    draft: tuple[int, int] | None = None,
    background: Rgb = BLACK,
    deep_range: DeepRange = FULL,
) -> Decoded:
    """Decodes like `decode_image`, and also returns what ingest needs to know."""
    most = math.inf if max_pixels is None else max_pixels
    wanted = _Wanted(most, draft, background, deep_range)
    with pixel_limit(most):
        try:
            return _read(data, wanted)
        except ImageError as error:
            return _read(_bare(data, error), wanted, icc_profile(data))


@dataclass(frozen=True)
class _Wanted:
    most_pixels: float
    draft: tuple[int, int] | None
    background: Rgb
    deep_range: DeepRange


def _bare(data: bytes, error: ImageError) -> bytes:
    """Returns the picture without metadata, which may be what failed; or raises the error again."""
    bare = without_metadata(data) if error.reason in ("decode_error", "truncated") else data
    if bare == data:
        raise error
    return bare


def _open(data: bytes, most: float) -> ImageFile.ImageFile:
    image = open_picture(data)
    check_pixels(image.size, most)
    return image


def _read(data: bytes, wanted: _Wanted, profile: bytes | None = None) -> Decoded:
    """Decodes; `profile` is the embedded profile if `data` no longer has it."""
    image = _open(data, wanted.most_pixels)
    raw_mode = deep_raw_mode(image)
    try:
        if wanted.draft is not None:
            image.draft(None, wanted.draft)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        if image.format == "JPEG2000":  # Pillow ignores its profile
            profile = icc_profile(data)
        profile = image.info.get("icc_profile") or profile
        levels = _levels(data, image, raw_mode, wanted.deep_range)
        flat, alpha = _split_alpha(data, image, levels.image, raw_mode)
        rgb = to_srgb(flat, profile)
        if alpha is not None:
            rgb = _over(rgb, alpha, wanted.background)
        if turn is not None:
            rgb = rgb.transpose(turn)
        as_it_is = raw_mode is None and alpha is None and turn is None
        plain = as_it_is and _is_common(image) and not changes_colours(profile, image.mode)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise refusal(error) from error
    rgb.info = {}  # the file's statements are no longer true
    return Decoded(rgb, data, image.format or "", plain, levels.dim)


def _is_common(image: ImageFile.ImageFile) -> bool:
    """Whether every decoder reads this kind of picture: RGB or grey, and a single frame."""
    single = image.format == "MPO" or not getattr(image, "is_animated", False)
    return image.mode in ("RGB", "L") and single


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata may raise anything, and the picture may be good
        return 1


def _levels(
    data: bytes, image: ImageFile.ImageFile, raw_mode: str | None, deep: DeepRange
) -> Levels:
    """Returns the picture in 8 bits a channel."""
    if image.mode.startswith("I") or image.mode == "F":
        return grey_levels(image, deep)
    if raw_mode is not None:
        return colour_levels(data, image, raw_mode, deep)
    return Levels(image, dim=False)


def _split_alpha(
    data: bytes, image: ImageFile.ImageFile, levels: Image.Image, raw_mode: str | None
) -> tuple[Image.Image, Image.Image | None]:
    """Returns the picture in RGB, L or CMYK, and its opacity (L) if it can be transparent."""
    mode = levels.mode
    if mode in ("LA", "La"):
        grey = levels.convert("LA")
        return grey.getchannel(0), grey.getchannel(1)
    if mode in ("RGBA", "PA", "RGBa") or (mode == "P" and "transparency" in image.info):
        rgba = levels.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel(3)
    flat = levels if mode in ("RGB", "L", "CMYK") else levels.convert("L" if mode == "1" else "RGB")
    if "transparency" not in image.info:
        return flat, None
    return flat, _opaque_but(image.info["transparency"], data, image, raw_mode)


def _opaque_but(
    colour: int | tuple[int, ...], data: bytes, image: ImageFile.ImageFile, raw_mode: str | None
) -> Image.Image:
    """Returns the opacity of a picture in which one stored colour is transparent (PNG's tRNS).

    Pillow itself compares only the high bytes of 16-bit RGB, ignores it in 16-bit grey, and
    compares grey of 2 and 4 bits after stretching it to 8.
    """
    if raw_mode is not None:
        values, bits = deep_values(data, image, raw_mode), 16
    elif image.mode.startswith("I"):
        values, bits = np.asarray(image), 16
    else:
        values, bits = np.asarray(image.convert("L") if image.mode == "1" else image), 8
    wanted = np.array(colour) & (2**bits - 1)
    stored = data[24] if image.format == "PNG" and image.mode == "L" else bits
    if stored in (2, 4):
        wanted = (wanted & (2**stored - 1)) * (255 // (2**stored - 1))
    same = values == wanted
    return Image.fromarray(
        np.where(same.all(axis=-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8)
    )


def _over(rgb: Image.Image, alpha: Image.Image, background: Rgb) -> Image.Image:
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, (*background, 255)), rgba).convert(
        "RGB"
    )
