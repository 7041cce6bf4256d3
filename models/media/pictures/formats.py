"""Recognises the format of a picture by its first bytes, and opens it with Pillow's reader.

`PIL.Image.open` tries one reader after another and does not say why each failed. Here the first
bytes choose the reader, and its error is passed on.
"""

from __future__ import annotations

import io
import re
import struct

# Importing each registers its reader.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from models.media.pictures.errors import ImageError

# Raster formats only: Pillow also opens documents and scene files (EPS runs Ghostscript).
_READERS = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "WEBP": WebPImagePlugin,
    "AVIF": AvifImagePlugin,
    "GIF": GifImagePlugin,
    "BMP": BmpImagePlugin,
    "TIFF": TiffImagePlugin,
    "PPM": PpmImagePlugin,
    "JPEG2000": Jpeg2KImagePlugin,
}
FORMATS = tuple(_READERS)
# Other formats that people may try. The error names them, so that nobody looks for damage.
_FOREIGN = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"v/1\x01", "OpenEXR"),
    (b"\x00\x00\x01\x00", "an icon (ICO)"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs")
# TIFF tags of the layout of pixels, for the message about a layout that Pillow cannot read.
_LAYOUT = {
    "bits": 258,
    "compression": 259,
    "photometric": 262,
    "samples": 277,
    "planar": 284,
    "extra samples": 338,
    "sample format": 339,
}


def format_of(data: bytes) -> str | None:
    """Returns the entry of `FORMATS` that the first bytes indicate, or None."""
    for name in FORMATS:
        accept = Image.OPEN[name][1]
        if accept is None or accept(data[:16]):
            # Two letters are not enough, because text may begin with them too.
            if name == "BMP" and not 12 <= int.from_bytes(data[14:18], "little") <= 256:
                continue
            if name == "PPM" and not re.match(rb"P.\s+[#\d]", data):
                continue
            return name
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def open_picture(data: bytes) -> ImageFile.ImageFile:
    """Reads the header of an encoded picture, without decoding pixels.

    Raises:
        ImageError: `empty`, `not_an_image`, `truncated`, `too_many_pixels` or `decode_error`.
    """
    if not data:
        raise ImageError("empty", "zero bytes")
    name = format_of(data)
    if name is None:
        raise ImageError("not_an_image", f"{_foreign(data)}none of {', '.join(FORMATS)}")
    try:
        image = Image.OPEN[name][0](io.BytesIO(data), "")
    except Exception as error:  # a hostile header may raise anything
        raise refusal(error, _more(name, data)) from error
    for key in ("icc_profile", "exif", "xmp"):  # a TIFF's tags may have any type
        if not isinstance(image.info.get(key, b""), bytes):
            del image.info[key]
    return image


def refusal(error: Exception, more: str = "") -> ImageError:
    """Turns what a reader or decoder raised into an ImageError; returns an ImageError unchanged."""
    if isinstance(error, ImageError):
        return error
    text = f"{type(error).__name__}: {error}{more}"
    cut_short = any(word in text.lower() for word in ("truncated", "eof", "end of file"))
    # Readers of a header that is cut short raise an error of the index they could not reach.
    cut_short |= isinstance(error.__cause__ or error, (IndexError, struct.error, EOFError))
    return ImageError("truncated" if cut_short else "decode_error", text)


def _more(name: str, data: bytes) -> str:
    """Returns what a reader's own message leaves out."""
    if name == "TIFF":
        return f" ({_tiff_layout(data)})"
    if name == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        return " (truncated: the file is shorter than it says)"
    return ""


def _foreign(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIC, "
    return next((f"{name}, " for magic, name in _FOREIGN if data.startswith(magic)), "")


def _tiff_layout(data: bytes) -> str:
    """Describes the layout of a TIFF's first picture, as far as its tags can be read."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        found = {name: tags.get(tag) for name, tag in _LAYOUT.items()}
    except Exception as error:  # the tags only serve a better message
        return f"tags: {error}"
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
