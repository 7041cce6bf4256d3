"""Decides which files of a source are items, and counts those that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pipelines.ingestion.entries.entries import UNLISTED, Entry
from pipelines.ingestion.listing.media import Content, Modality, suffix_of, suffixes
from pipelines.ingestion.listing.sidecars import SIDECAR_SUFFIXES
from pipelines.runtime.names import escaped

MODALITIES: tuple[Modality, ...] = ("image", "video")

MOST_SUFFIXES = 8  # told by name

Counts = tuple[tuple[str, int], ...]


def says_what_it_is(path: str) -> bool:
    """Whether a name has a suffix of images or videos."""
    return any(suffix_of(path) in suffixes(modality) for modality in MODALITIES)


def is_item(entry: Entry, modality: Modality, looked: dict[str, Content]) -> bool:
    """Whether a file of a folder is of this modality by its suffix or content.

    A file without a suffix whose content does not tell is an item too: objects named by a hash have
    no suffix, and damaged ones should be reported.
    """
    suffix = suffix_of(entry.path)
    if suffix in suffixes(modality) or entry.size == UNLISTED:
        return True
    if says_what_it_is(entry.path):
        return False
    content = looked.get(entry.path, "")
    return content == modality or (not suffix and content == "")


def is_named_item(entry: Entry, modality: Modality) -> bool:
    """Whether a listed file is an item, which all are whose suffix does not say otherwise."""
    if suffix_of(entry.path) in suffixes(modality):
        return True
    return not (entry.path.endswith(SIDECAR_SUFFIXES) or says_what_it_is(entry.path))


def count_suffixes(entries: Iterable[Entry]) -> Counts:
    """Returns how many files there are of each suffix, the commonest first."""
    names = Counter(escaped(suffix_of(entry.path)) or "without a suffix" for entry in entries)
    return tuple(sorted(names.items(), key=lambda item: (-item[1], item[0])))


def told(counts: Counts) -> str:
    """Returns counts of files by suffix as text."""
    total = sum(count for _, count in counts)
    shown = ", ".join(f"{count} {suffix}" for suffix, count in shortened(counts))
    return f"{total} files there" + (f": {shown}" if shown else "")


def shortened(counts: Counts) -> Counts:
    """Returns the commonest suffixes, and all others as one."""
    rest = sum(count for _, count in counts[MOST_SUFFIXES:])
    return (*counts[:MOST_SUFFIXES], *([("others", rest)] if rest else []))


def find_modality(entries: Sequence[Entry], looked: dict[str, Content]) -> Modality | None:
    """Returns what the files are, by suffix or else by content; None where they are both."""
    found = {suffix_of(entry.path) for entry in entries} - {".gif"}  # either
    images, videos = (bool(found & suffixes(modality)) for modality in MODALITIES)
    if not (images or videos):
        images, videos = ("image" in looked.values(), "video" in looked.values())
    if images and videos:
        return None
    return "video" if videos else "image"
