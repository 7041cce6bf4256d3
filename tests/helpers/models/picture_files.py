"""Encoded pictures put together byte by byte: what no library would write on purpose."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def chunk(kind: bytes, body: bytes = b"", *, checksum: int | None = None) -> bytes:
    right = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", right)


def png(
    values: np.ndarray, bits: int, colour_type: int, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG of integers [H, W] or [H, W, C] of `bits` bits; chunks before and after the pixels."""
    height, width = values.shape[:2]
    rows = []
    for row in values.reshape(height, -1):
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(b"\0" + int(text, 2).to_bytes(len(text) // 8, "big"))
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return SIGNATURE + chunk(b"IHDR", head) + before + pixels + after + chunk(b"IEND")


def with_chunks(data: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with more chunks behind its header, and before its end."""
    return data[:33] + before + data[33:-12] + after + data[-12:]


def with_segment(data: bytes, marker: int, body: bytes, *, length: int | None = None) -> bytes:
    """A JPEG with one more segment at its beginning."""
    size = len(body) + 2 if length is None else length
    return data[:2] + struct.pack(">BBH", 0xFF, marker, size) + body + data[2:]


def tiff(values: np.ndarray, tags: dict[int, tuple[int, list[int]]], strip: bytes = b"") -> bytes:
    """A little-endian TIFF of one uncompressed strip: tags as {number: (type 3 or 4, values)}."""
    height, width = values.shape[:2]
    pixels = strip or values.tobytes()
    entries = {
        256: (3, [width]),
        257: (3, [height]),
        259: (3, [1]),
        278: (3, [height]),
        279: (4, [len(pixels)]),
        **tags,
        273: (4, [0]),
    }
    start = 8 + 2 + 12 * len(entries) + 4
    extra = b""
    table = struct.pack("<H", len(entries))
    sizes = {3: ("H", 2), 4: ("I", 4)}
    body_of = {}
    for tag, (kind, items) in entries.items():
        code, size = sizes[kind]
        packed = struct.pack(f"<{len(items)}{code}", *items)
        if len(items) * size > 4:
            body_of[tag] = struct.pack("<I", start + len(extra))
            extra += packed + b"\0" * (len(packed) % 2)
        else:
            body_of[tag] = packed.ljust(4, b"\0")
    body_of[273] = struct.pack("<I", start + len(extra))
    for tag in sorted(entries):
        kind, items = entries[tag]
        table += struct.pack("<HHI", tag, kind, len(items)) + body_of[tag]
    return b"II*\0" + struct.pack("<I", 8) + table + struct.pack("<I", 0) + extra + pixels


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 2.4, of an input device: `space` is `RGB `, `GRAY` or `CMYK`."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        **tags,
    }
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI", at + len(body), b"test", 0x02400000)
    head += b"scnr" + space + connection + b"\0" * 12 + b"acsp" + b"\0" * 28
    head += struct.pack(">3I", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(primaries_to_xyz: np.ndarray, gamma: float) -> bytes:
    """Matrix (columns: XYZ of red, green and blue, of the D50 white) and a power curve."""
    curve = gamma_curve(gamma)
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries_to_xyz.T.tolist(), strict=True)
    tags = {name: xyz(*column) for name, column in columns}
    return icc(b"RGB ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile(lab_of_corners: np.ndarray) -> bytes:
    """A table of the 16 corners of the CMYK cube (C slowest) in L (0 to 100), a, b."""
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    coded = lab_of_corners * [2.55, 1, 1] + [0, 128, 128]
    grid = coded.round().astype(np.uint8).tobytes()
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + grid + identity * 3
    return icc(b"CMYK", {b"A2B0": table, b"A2B1": table, b"A2B2": table}, b"Lab ")
