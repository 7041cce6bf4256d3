"""Matches the label files of a tar to its images by their names.

Only names and labels of an archive are kept (about 650 bytes a member), and they are matched at its
end. So a label counts wherever it stands, and no image is read twice or waits in memory.
"""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipelines.ingestion.listing.media import suffix_of
from pipelines.ingestion.reading.items import Problem, Tally
from pipelines.ingestion.reading.labels import LABEL_SUFFIXES, NO_FIT, Label

# More images than this share a name only by chance (`shot.0001.png`), not as pictures of a sample.
MOST_OF_A_SAMPLE = 16

Labelled = tuple[Label, Problem | None]


def stems(path: str) -> Iterator[str]:
    """Yields `path`, then `path` without its last suffix, without its last two, and so on.

    The last one is the key by which WebDataset groups: the path up to the first dot of the name.
    """
    folder, slash, name = path.rpartition("/")
    while name:
        yield f"{folder}{slash}{name}"
        name = name.rpartition(".")[0]


def key_of(path: str) -> str:
    """Returns the path up to the first dot of the name."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def gives_way(path: str, stems_taken: set[str], wanted: Iterable[str]) -> bool:
    """True for `x.seg.png` where `x.png` is taken, unless `seg.png` itself is among the wanted."""
    _, _, *shorter = stems(path)
    return any(s in stems_taken and path[len(s) + 1 :].lower() not in wanted for s in shorter)


@dataclass(slots=True)
class Picture:
    """An image of the archive.

    Attributes:
        number: the item's number.
        path: the member's path.
        archive: which archive, if several stand one after the other in one file.
        label_stem: the stem that its name shares with its label file; "" without one.
    """

    number: int
    path: str
    archive: int
    label_stem: str = ""


@dataclass(slots=True)
class LabelFile:
    """A label file of the archive, with its label.

    Attributes:
        path: the member's path.
        archive: as in `Picture`.
        label: class index or name.
        problem: why the file gives no label.
        used: whether it belongs to an image.
    """

    path: str
    archive: int
    label: Label
    problem: Problem | None
    used: bool = False


@dataclass
class Samples:
    """The names in one archive.

    Attributes:
        pictures: all images, in the order of the archive.
        labels: all label files, in the same order.
    """

    pictures: list[Picture] = field(default_factory=list)
    labels: list[LabelFile] = field(default_factory=list)

    def finish(self, tally: Tally) -> None:
        """Writes every image's label to `tally`, and counts the label files."""
        found: dict[int, Labelled] = {}
        pictures: dict[int, list[Picture]] = defaultdict(list)
        labels: dict[int, list[LabelFile]] = defaultdict(list)
        for picture in self.pictures:
            pictures[picture.archive].append(picture)
        for label in self.labels:
            labels[label.archive].append(label)
        for archive, files in labels.items():
            _fit(pictures[archive], files, found)
        # All images in one archive, all labels in the next.
        _fit(self._without(found), [file for file in self.labels if not file.used], found)
        self._fit_samples(found)
        self._take_folders(found)
        tally.labels |= found
        used = sum(label.used for label in self.labels)
        tally.ignored += Counter({"label": used, "label without image": len(self.labels) - used})

    def _without(self, found: dict[int, Labelled]) -> list[Picture]:
        return [picture for picture in self.pictures if picture.number not in found]

    def _fit_samples(self, found: dict[int, Labelled]) -> None:
        """Gives images that no label file fits the only label file of their sample, if any."""
        by_key: dict[tuple[int, str], list[LabelFile]] = defaultdict(list)
        for label in self.labels:
            by_key[label.archive, key_of(label.path)].append(label)
        used = []
        for picture in self._without(found):
            labels = by_key.get((picture.archive, key_of(picture.path)), [])
            if len(labels) == 1 and not labels[0].used:
                used += labels
                found[picture.number] = labels[0].label, labels[0].problem
            elif labels:
                detail = f"none of {len(labels)} label files of its sample is named after it"
                found[picture.number] = None, (NO_FIT, detail)
        for label in used:
            label.used = True

    def _take_folders(self, found: dict[int, Labelled]) -> None:
        """Labels images by their folder where it has no label files and none stands apart."""
        labelled = {posixpath.dirname(label.path) for label in self.labels}
        apart = {_base(label.path) for label in self.labels if not label.used}
        for picture in self._without(found):
            folder = posixpath.dirname(picture.path)
            label = posixpath.basename(folder) or None
            if folder not in labelled and _base(picture.path) not in apart:
                found[picture.number] = label, None

    def sharing(self) -> int:
        """Returns how many images share their sample with others, and its label if there is one."""
        samples: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
        for picture in self.pictures:
            samples[picture.archive, key_of(picture.path)][picture.path] = picture.label_stem
        total = 0
        for sample in samples.values():
            users = Counter(sample.values())
            shared = [stem for stem in sample.values() if not stem or users[stem] > 1]
            total += len(shared) if 2 <= len(shared) <= MOST_OF_A_SAMPLE else 0
        return total


def _base(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _fit(
    pictures: Iterable[Picture], labels: Iterable[LabelFile], found: dict[int, Labelled]
) -> None:
    """Finds for every picture the label file with the longest stem that begins its name."""
    by_stem: dict[str, list[LabelFile]] = defaultdict(list)
    for label in labels:
        by_stem[posixpath.splitext(label.path)[0]].append(label)
    pictures = list(pictures)
    copies, seen = Counter(picture.path for picture in pictures), Counter[str]()
    for picture in pictures:
        place = seen[picture.path]
        seen[picture.path] += 1
        for stem in stems(picture.path):
            if stem in by_stem:
                picture.label_stem = stem
                found[picture.number] = _choose(by_stem[stem], place, copies[picture.path])
                break


def _choose(files: list[LabelFile], place: int, copies: int) -> Labelled:
    """Chooses among label files of one stem.

    Args:
        files: of any suffix, also several of one name.
        place: the image's number among those of its name.
        copies: how many images have its name.
    """
    chosen: list[Labelled] = []
    for suffix in LABEL_SUFFIXES:
        same = [file for file in files if suffix_of(file.path) == suffix]
        for file in same:
            file.used = True
        if len(same) == copies:
            chosen.append((same[place].label, same[place].problem))
        elif (copies == 1 and same) or len({(file.label, file.problem) for file in same}) == 1:
            chosen.append((same[-1].label, same[-1].problem))  # as extracting the tar leaves it
        elif same:
            detail = f"{len(same)} label files named after {copies} images of one name"
            chosen.append((None, (NO_FIT, detail)))
    return min(chosen, key=lambda labelled: (labelled[1] is not None, labelled[0] is None))
