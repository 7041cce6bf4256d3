"""One image as it will be stored: validated by decoding all of it, re-encoded where needed."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.media.images import open_image, read_image
from models.media.pictures.errors import ImageError
from pipelines.config.checks import parse_colour
from pipelines.config.ingest import IngestConfig

_FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
_LEVELS = np.arange(256, dtype=np.int64)
_POWERS = np.stack([_LEVELS, _LEVELS**2], axis=1)
DIM = "dim 16-bit images"
"""The note on a 16-bit image that uses less than an eighth of its range."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One validated image, as it will be stored.

    Attributes:
        data: encoded.
        height: pixels.
        width: pixels.
        moments: `pixel_moments`.
        notes: what somebody may want to know of it, as names to count.
    """

    data: bytes
    height: int
    width: int
    moments: list[float]
    notes: tuple[str, ...] = ()


def prepare_image(data: bytes, cfg: IngestConfig) -> Prepared:
    """Validates an encoded image by decoding all of it, and re-encodes it where `cfg` asks for it.

    Raises:
        ImageError: the image is refused, with the reason.
    """
    if len(data) > cfg.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data)} is over the limit of {cfg.max_bytes}")
    draft = _draft(data, cfg)
    found = read_image(
        data,
        max_pixels=cfg.max_pixels,
        draft=draft,
        background=parse_colour("background", cfg.background),
        deep_range=cfg.deep_range,
    )
    image = found.image
    if draft is not None:
        target = target_size(image.width, image.height, cfg.short_side)
        image = image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
    source_format = _FORMATS.get(found.format)
    target_format = source_format or "png" if cfg.encode == "keep" else cfg.encode
    kept = draft is None and source_format == target_format and found.plain
    data = found.encoded if kept else _encode(image, target_format, cfg.quality)
    notes = (DIM,) if found.dim else ()
    return Prepared(data, image.height, image.width, pixel_moments(image), notes)


def _draft(data: bytes, cfg: IngestConfig) -> tuple[int, int] | None:
    """Returns the least size to decode, twice the stored one; None if the size does not change."""
    if cfg.short_side is None:
        return None
    size = open_image(data, max_pixels=cfg.max_pixels).size
    target = target_size(*size, cfg.short_side)
    return None if target == size else (2 * target[0], 2 * target[1])


def target_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Returns width and height scaled so that the short side is `short_side`, never enlarged."""
    short = min(width, height)
    if short_side is None or short <= short_side:
        return width, height
    return round(width * short_side / short), round(height * short_side / short)


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
