"""The items that reading a chunk yields, and the tally of everything else it finds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipelines.ingestion.reading.labels import Label

Problem = tuple[str, str]  # reason (short and stable, for counting), detail (for people)


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video of a source, undecoded, or the reason why it cannot be read.

    Attributes:
        uri: address of the file, or `file#member` of a tar, or `file#row=N` of a Parquet file.
        data: an image's encoded bytes.
        label: class index or class name.
        problem: why the item could not be had.
        label_problem: why it has no label although one came with it; the item itself is good.
        path: a video's file on this machine, there until the next item is asked for.
        sidecars: the files beside a video, by name ("actions", "states").
        size: bytes of that file.
    """

    uri: str
    data: bytes = b""
    label: Label = None
    problem: Problem | None = None
    label_problem: Problem | None = None
    path: str = ""
    sidecars: tuple[tuple[str, bytes], ...] = ()
    size: int = 0

    @property
    def num_bytes(self) -> int:
        """Encoded bytes of the item."""
        return self.size or len(self.data)


@dataclass
class Tally:
    """What reading a chunk finds besides its items; whole once the last of these has been read.

    Attributes:
        labels: labels (and label problems) that were found after their item, by the item's number.
        ignored: what the chunk holds that is no item, by kind.
        notes: what its user should hear of, by kind; no count of items.
    """

    labels: dict[int, tuple[Label, Problem | None]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
