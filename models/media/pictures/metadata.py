"""Reads and removes metadata of image files without decoding pixels.

Text, comments, thumbnails and the like are often damaged or huge in files that every viewer shows.
Pillow reads all of it and fails; `without_metadata` returns the same picture without the metadata
that it does not need.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
ORIENTATION = 0x0112
MOST_PROFILE_BYTES = 4 * 2**20
"""Largest colour profile. They are seldom over 2 MiB, so larger ones are taken for damage."""
_PILLOWS_TEXT = 2**20
"""Most bytes that Pillow inflates of one PNG chunk (`PngImagePlugin.MAX_TEXT_CHUNK`)."""
# PNG chunks, other than critical ones, that change the picture, and the least size of an intact
# one.
_SEEN = {b"tRNS": 1, b"iCCP": 4, b"eXIf": 1}
_TRANSPARENT = {0: 2, 2: 6, 3: 1}  # least size of tRNS, by colour type
_NO_LENGTH = (0x01, *range(0xD0, 0xD9))
_SOS, _APP0, _APP1, _APP2, _APP14, _APP15, _COM = 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_ICC, _EXIF = b"ICC_PROFILE\0", b"Exif\0\0"


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (type, whole chunk with length and checksum); the last one may be cut short."""
    at = len(PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at : at + 12 + length]
        at += 12 + length
        if kind == b"IEND":
            return


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start, stop) of the segments before the pixels, as byte positions.

    The last segment is the scan and everything after it. Stops early at an impossible length.
    """
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:  # as readers do, look for the next marker
            at += 1
            continue
        marker = data[at + 1]
        if marker in (0x00, 0xFF) or marker in _NO_LENGTH:
            at += 1 if marker in (0x00, 0xFF) else 2
            continue
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SOS:
            yield marker, at, len(data)
            return
        if length < 4 or at + length > len(data):
            return
        yield marker, at, at + length
        at += length


def icc_profile(data: bytes) -> bytes | None:
    """Returns the colour profile embedded in a PNG, JPEG or JPEG 2000 file, without decoding."""
    if data.startswith(_JP2):
        return _jp2_profile(data)
    if data.startswith(PNG):
        for kind, chunk in png_chunks(data):
            if kind == b"iCCP":
                return _inflate_profile(chunk[8:-4])
            if kind == b"IDAT":
                break
        return None
    parts = [
        data[start + 4 : stop]
        for marker, start, stop in jpeg_segments(data)
        if marker == _APP2 and data[start + 4 : start + 16] == _ICC
    ]
    whole = bool(parts) and len(parts[0]) > 13 and parts[0][13] == len(parts)
    # In the order of their numbers, which may differ from the order in the file.
    return b"".join(part[14:] for part in sorted(parts)) if whole else None


def _jp2_profile(data: bytes) -> bytes | None:
    """Returns the profile of a JP2 file: box colr in its header, method 2 (restricted) or 3."""
    for kind, start, stop in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            inner = [box for box in _boxes(data, start, stop) if box[0] == b"colr"]
            found = (
                data[at + 3 : end] for _, at, end in inner if data[at : at + 1] in (b"\2", b"\3")
            )
            return next(found, None)
    return None


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, start of content, stop) of ISO boxes with 32-bit lengths."""
    while at + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, at)
        if length < 8 or at + length > end:
            return
        yield kind, at + 8, at + length
        at += length


def has_transparent_colour(data: bytes) -> bool:
    """Whether a PNG file of 8-bit grey or RGB declares one colour transparent."""
    for kind, _ in png_chunks(data):
        if kind == b"IDAT":
            return False
        if kind == b"tRNS":
            return True
    return False


def without_metadata(data: bytes) -> bytes:
    """Returns a PNG or JPEG file without the metadata that its pixels do not need.

    Transparency, orientation and an intact colour profile stay. Of an AVIF file only the Exif item
    is removed; other files are returned unchanged.
    """
    if data.startswith(PNG):
        colours = data[25] if len(data) > 25 else 0
        kept = (part for kind, part in png_chunks(data) if _keep_chunk(kind, part, colours))
        return PNG + b"".join(kept)
    if data.startswith(JPEG):
        return data[:2] + b"".join(_kept_segments(data))
    if data[4:8] == b"ftyp":
        return _without_exif_item(data)
    return data


def _keep_chunk(kind: bytes, chunk: bytes, colour_type: int) -> bool:
    critical = bool(kind[:1].isupper())
    if critical or kind not in _SEEN:
        return critical
    least = _TRANSPARENT.get(colour_type, 1) if kind == b"tRNS" else _SEEN[kind]
    if len(chunk) - 12 < least or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    profile = _inflate_profile(chunk[8:-4]) if kind == b"iCCP" else b""
    return profile is not None and len(profile) < _PILLOWS_TEXT


def _inflate_profile(body: bytes) -> bytes | None:
    """Returns the profile of an iCCP chunk: name, a zero, the method (0), deflated bytes."""
    _, _, rest = body.partition(b"\0")
    if rest[:1] != b"\0":
        return None
    try:
        inflater = zlib.decompressobj()
        profile = inflater.decompress(rest[1:], MOST_PROFILE_BYTES)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail or not profile else profile


def _kept_segments(data: bytes) -> Iterator[bytes]:
    end = 2
    for marker, start, stop in jpeg_segments(data):
        end = stop
        body = data[start + 4 : stop]
        if marker == _APP1 and body.startswith(_EXIF):
            yield _exif_segment(orientation_of(body))
        elif _says_colours(marker, body) or not (_APP0 <= marker <= _APP15 or marker == _COM):
            yield data[start:stop]
    yield data[end:]


def _says_colours(marker: int, body: bytes) -> bool:
    """Whether a segment describes the colours: a complete one of JFIF or Adobe, or a profile."""
    heads = {_APP0: (b"JFIF\0", 14), _APP14: (b"Adobe", 12), _APP2: (_ICC, 15)}
    head, least = heads.get(marker, (b"", 0))
    return bool(head) and body.startswith(head) and len(body) >= least


def orientation_of(exif: bytes) -> int:
    """Returns the orientation in Exif data; 1, upright, if it is missing or damaged."""
    values = Image.Exif()
    try:
        values.load(exif)
        return int(values.get(ORIENTATION, 1))
    except Exception:  # damaged metadata may raise anything, and say nothing of the picture
        return 1


def _exif_segment(orientation: int) -> bytes:
    if orientation == 1:
        return b""
    values = Image.Exif()
    values[ORIENTATION] = orientation
    body = values.tobytes()
    return struct.pack(">BBH", 0xFF, _APP1, len(body) + 2) + body


def _without_exif_item(data: bytes) -> bytes:
    """Renames the Exif item in an AVIF file's list of items, which moves no other byte."""
    at = data.find(b"infe")
    while at >= 0:
        if data[at + 12 : at + 16] == b"Exif":  # after version, flags, item number and protection
            data = data[: at + 12] + b"skip" + data[at + 16 :]
        at = data.find(b"infe", at + 4)
    return data
