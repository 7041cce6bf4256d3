"""One image as it will be stored: validated by decoding all of it, re-encoded where needed."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.images import ImageError, decode_image, open_image
from pipelines.config import IngestConfig

_FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
_EXIF_TRACES = (b"Exif", b"eXIf", b"EXIF", b"profile type exif", b"Orientation")
_LEVELS = np.arange(256, dtype=np.int64)
_POWERS = np.stack([_LEVELS, _LEVELS**2], axis=1)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One validated image, as it will be stored."""

    data: bytes
    height: int
    width: int
    moments: list[float]


def prepare_image(data: bytes, cfg: IngestConfig) -> Prepared:
    """Validates an encoded image by decoding all of it, and re-encodes it where `cfg` asks for it.

    Raises:
        ImageError: the image is refused, with the reason.
    """
    if len(data) > cfg.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data)} is over the limit of {cfg.max_bytes}")
    header = open_image(data, max_pixels=cfg.max_pixels)
    size = target_size(header.width, header.height, cfg.short_side)
    resized = size != header.size
    image = decode_image(
        data, max_pixels=cfg.max_pixels, draft=(2 * size[0], 2 * size[1]) if resized else None
    )
    if resized:
        target = target_size(image.width, image.height, cfg.short_side)
        image = image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
    source_format = _FORMATS.get(header.format or "")
    target_format = source_format or "png" if cfg.encode == "keep" else cfg.encode
    if resized or source_format != target_format or not _is_plain(header, data):
        data = _encode(image, target_format, cfg.quality)
    return Prepared(data, image.height, image.width, pixel_moments(image))


def target_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Returns width and height scaled so that the short side is `short_side`, never enlarged."""
    short = min(width, height)
    if short_side is None or short <= short_side:
        return width, height
    return round(width * short_side / short), round(height * short_side / short)


def _is_plain(header: Image.Image, data: bytes) -> bool:
    """True when any decoder gets the right picture: 8-bit RGB or grey, upright, a single frame."""
    if header.mode not in ("RGB", "L") or "transparency" in header.info:
        return False
    if header.format == "PNG" and data[24] == 16:  # bits a channel; Pillow makes 8 of them
        return False
    if header.format != "MPO" and getattr(header, "is_animated", False):
        return False
    # Asking for EXIF data decodes a whole PNG, so look for traces of it in the bytes first.
    if not any(trace in data for trace in _EXIF_TRACES):
        return True
    return bool(header.getexif().get(0x0112, 1) == 1)  # the orientation tag


def _encode(image: Image.Image, target: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options = {} if target == "png" else {"quality": quality}
    try:
        image.save(buffer, target, **options)
    except (OSError, ValueError) as error:  # larger than the format can hold
        raise ImageError("encode_error", f"{type(error).__name__}: {error}") from error
    return buffer.getvalue()


def pixel_moments(image: Image.Image) -> list[float]:
    """Returns the RGB means of pixels, then of squared pixels, exact up to the last division."""
    counts = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
    sums = counts @ _POWERS
    pixels = image.width * image.height
    return (sums / (pixels * np.array([255, 255 * 255]))).T.ravel().tolist()  # type: ignore[no-any-return]
