"""One picture in every format that ingest must know, and what each must come out as."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from benchmarks.data.ingest import noise


def save(image: Image.Image, target: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, target, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[0x0112] = orientation
    return values


RGB = noise(0)
GREY = RGB.convert("L")
RAMP16 = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
RGBA = RGB.copy()
RGBA.putalpha(GREY)

# Name, encoded image, the RGB it must come out as, mean difference allowed, bytes kept?
FORMATS = [
    ("png", save(RGB, "PNG"), RGB, 0, True),
    ("jpeg", save(RGB, "JPEG"), RGB, 8, True),
    ("webp_lossless", save(RGB, "WEBP", lossless=True), RGB, 0, True),
    ("grey_png", save(GREY, "PNG"), GREY.convert("RGB"), 0, True),
    ("grey_jpeg", save(GREY, "JPEG"), GREY.convert("RGB"), 8, True),
    ("bmp", save(RGB, "BMP"), RGB, 0, False),
    ("tiff", save(RGB, "TIFF"), RGB, 0, False),
    ("gif", save(GREY, "GIF"), GREY.convert("RGB"), 0, False),
    ("bilevel", save(RGB.convert("1"), "PNG"), RGB.convert("1").convert("RGB"), 0, False),
    ("cmyk", save(RGB.convert("CMYK"), "JPEG", quality=95), RGB, 8, False),
    (
        "grey_16bit",
        save(Image.fromarray(RAMP16), "PNG"),
        Image.fromarray((RAMP16 / 257.0).round().astype(np.uint8)).convert("RGB"),
        1,
        False,
    ),
    (
        "rgba",
        save(RGBA, "PNG"),
        Image.composite(RGB, Image.new("RGB", RGB.size), GREY),
        1,
        False,
    ),
    ("exif_upright", save(RGB, "JPEG", exif=exif(1)), RGB, 8, True),
    (
        "exif_90",
        save(RGB, "JPEG", exif=exif(6)),
        RGB.transpose(Image.Transpose.ROTATE_270),
        40,
        False,
    ),
    (
        "exif_png",
        save(RGB, "PNG", exif=exif(3)),
        RGB.transpose(Image.Transpose.ROTATE_180),
        0,
        False,
    ),
    (
        "exif_webp",
        save(RGB, "WEBP", lossless=True, exif=exif(8)),
        RGB.rotate(90, expand=True),
        30,
        False,
    ),
]
