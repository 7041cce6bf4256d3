"""Encoded image bytes to an upright RGB picture; the only decoder in the project."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000

# Raster formats only: Pillow also opens documents and scene files (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: one of `empty`, `not_an_image`, `truncated`, `too_many_pixels`, `unknown_range`,
            `decode_error`; short and stable, for counting.
        detail: what the decoder said, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        """Crosses process borders with both fields."""
        return type(self), (self.reason, self.detail)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header of an encoded image and checks its size; pixels stay undecoded.

    Raises:
        ImageError: `empty`, `not_an_image` or `too_many_pixels`.
    """
    if not data:
        raise ImageError("empty", "zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"none of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limits, ahead of ours below (the warning only where it is made an error).
        raise ImageError("too_many_pixels", str(error)) from error
    except Exception as error:  # a hostile header may raise anything; none of it may pass
        raise ImageError("decode_error", f"{type(error).__name__}: {error}") from error
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise ImageError("too_many_pixels", f"{size} is over the limit of {max_pixels} pixels")
    return image


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, draft: tuple[int, int] | None = None
) -> Image.Image:
    """Decodes JPEG, PNG, WebP and whatever else Pillow reads into an upright RGB image.

    EXIF rotation is applied, transparency is laid over black, CMYK is converted, the first frame of
    an animation is taken. Deep greyscale is scaled by its type's range: 0 to 65535 for 16 bits, 0 to 1
    for floating point. What lies outside, and 32-bit and signed integers, for which no range is
    agreed upon (photographs, counts, heights), is refused as `unknown_range`.

    Args:
        data: the encoded bytes.
        max_pixels: refuse larger images before decoding them.
        draft: JPEG only: decode at a reduced scale not smaller than this (width, height), which
            saves most of the work when a small picture is wanted from a large one.

    Raises:
        ImageError: with the reason; a partly decodable image is refused, never filled up.
    """
    image = open_image(data, max_pixels=max_pixels)
    try:
        if draft is not None:
            image.draft(None, draft)
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _to_rgb(upright, tiff=image.format == "TIFF")
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        text = f"{type(error).__name__}: {error}"
        cut_short = any(word in text.lower() for word in ("truncated", "eof", "end of file"))
        raise ImageError("truncated" if cut_short else "decode_error", text) from error


def _to_rgb(image: Image.Image, *, tiff: bool) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" and tiff:
        raise ImageError("unknown_range", "32-bit or signed integers; store 8 or 16 bits")
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_deep_grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit integers and floating point to 8 bits by their range; Pillow's own clips at 255."""
    values = np.asarray(image, dtype=np.float64)
    # Mode "I" from anything but TIFF (PGM, or PNG in older Pillow) holds 16 bits.
    top = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= top):  # so that NaN is refused too
        found = f"values from {values.min():g} to {values.max():g}"
        raise ImageError("unknown_range", f"{found}, not within 0 to {top:g}")
    return Image.fromarray((values / top * 255.0).round().astype(np.uint8))
