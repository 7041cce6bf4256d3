"""Which files of a source are images or videos: by suffix where it says so, else by content."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image

from models.media.pictures.formats import FORMATS, format_of
from pipelines.ingestion.entries.entries import Entry

Modality = Literal["image", "video"]
# What a look into a file found; "" where its bytes do not tell.
Content = Literal["image", "video", "text", "marker", ""]

VIDEO_SUFFIXES = frozenset([".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"])
# Pillow registers these apart, but opens them with the decoders of JPEG and BMP.
_ALIASES = {"MPO": "JPEG", "DIB": "BMP"}

HEAD_BYTES = 512
_UNTELLING = "?"
# Files of one suffix that are looked into before it counts as no medium's, and at most.
FIRST_LOOKS, MOST_LOOKS = 16, 4096

_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# What a name ends in that says what the file is: no part of a date, a version or a DICOM number.
_TELLING = re.compile(r"\.(?=.*[a-z])[a-z0-9_~-]{1,12}")
# Beginning like an MP4, and no video: pictures, raw files of cameras, sound.
_OTHER_BRANDS = re.compile(rb"ftyp(hei|hev|mif|msf|avi|crx|jp[2xm]|jxl|M4[ABP]|F4[AB])")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"pnot")


@functools.cache
def suffixes(modality: Modality) -> frozenset[str]:
    """Returns the suffixes, in lower case, of files of that modality; `.gif` is one of either.

    Of images: every one that Pillow registers for a format that `models.media.images` decodes.
    """
    if modality == "video":
        return VIDEO_SUFFIXES
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if _ALIASES.get(name, name) in FORMATS)


def suffix_of(path: str) -> str:
    """Returns the last suffix in lower case, as `PurePath.suffix` does but 10 times as fast."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def content_of(head: bytes, *, named: bool = False) -> Content:
    """Says what a file is by its first bytes.

    Args:
        head: the first `HEAD_BYTES`, or all there are.
        named: the file has a suffix of its own. Then TIFF does not count: cameras' raw files and
            microscopes' stacks begin like one, and only a thumbnail would be read of them.
    """
    picture = format_of(head)
    if picture == "AVIF" and not re.search(rb"avi[fs]", head[8:64]):  # some HEIC begins the same
        picture = None
    if picture is not None and not (named and picture == "TIFF"):
        return "image"
    if _OTHER_BRANDS.match(head[4:12]):
        return ""
    if head[4:8] in _MP4_BOXES or head.startswith(b"\x1aE\xdf\xa3"):
        return "video"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "video"
    return "text" if head and not _CONTROLS.search(head) else ""


def look_into(fs: Any, entries: Sequence[Entry]) -> dict[str, Content]:
    """Reads the beginning of files whose suffix says nothing; returns what they are, by path.

    Of each suffix a few files first; where none is a medium it counts as none's, and the rest are
    not opened. Files without a suffix are all looked into, up to `MOST_LOOKS`; so are those whose
    name only has a dot in it (`x.jpg?size=large`, `2020.01.02 at 10.30`).

    Args:
        fs: the file system of all of them.
        entries: files, in an order that depends on the listing alone.
    """
    by_suffix: dict[str, list[Entry]] = {}
    for entry in entries:
        suffix = suffix_of(entry.path)
        known = _TELLING.fullmatch(suffix) or not suffix
        by_suffix.setdefault(suffix if known else _UNTELLING, []).append(entry)
    found: dict[str, Content] = {}
    for suffix, group in by_suffix.items():
        named = suffix not in ("", _UNTELLING)
        looks = FIRST_LOOKS if named else MOST_LOOKS
        first = _look(fs, group[:looks], named=named)
        found |= first
        media = [kind for kind in first.values() if kind in ("image", "video")]
        if suffix and not media:
            continue
        found |= _look(fs, group[looks:MOST_LOOKS], named=named)
        if suffix:  # the rest are what the first ones are
            found |= {entry.path: media[0] for entry in group[MOST_LOOKS:]}
    return found


def _look(fs: Any, entries: Sequence[Entry], *, named: bool) -> dict[str, Content]:
    found: dict[str, Content] = {e.path: "marker" for e in entries if _is_marker(e)}
    wanted = [entry for entry in entries if entry.size > 0]
    ends = [min(entry.size, HEAD_BYTES) for entry in wanted]
    paths = [entry.path for entry in wanted]
    heads = fs.cat_ranges(paths, [0] * len(paths), ends, on_error="return") if paths else []
    for entry, head in zip(wanted, heads, strict=True):
        unread = isinstance(head, BaseException)  # the reader will say why
        found[entry.path] = "" if unread else content_of(head, named=named)
    return found


def _is_marker(entry: Entry) -> bool:
    """True for the empty files with which Hadoop and Spark mark folders and finished jobs."""
    name = entry.path.rpartition("/")[2]
    return entry.size == 0 and (name.endswith("$folder$") or name.startswith("_"))
