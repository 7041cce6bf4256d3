"""Decides which folder above a file is its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipelines.runtime.names import escaped

# Names of folders that sort files by something else than what they show.
_SPLITS = frozenset(
    ["train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"]
)
_CONTENTS = frozenset(
    [
        *("image", "images", "img", "imgs", "jpeg", "jpegs", "jpegimages", "jpg", "png"),
        *("photos", "pictures", "frames", "video", "videos", "clips"),
    ]
)


def folder_labels(
    names: Sequence[str], level: int | None = None
) -> tuple[list[str | None], tuple[str, ...]]:
    """Returns the class of each file by its folders, and what the user should know of it.

    By default that is the file's own folder. Where all of these are called `images`, `train` and
    the like (`train/CLASS/images/x.jpg`, `CLASS/test/x.jpg`), it is the one above.

    Args:
        names: paths below the source.
        level: the folder to take: 1 is the first below the source, -1 the file's own, 0 none.
    """
    folders = [tuple(filter(None, name.split("/")[:-1])) for name in names]  # keys may hold `//`
    if level is not None:
        return [_at(path, level) for path in folders], ()
    own = [_at(path, -1) for path in folders]
    common = sorted({label for label in own if label})
    if not common or not all(map(_is_common, common)):
        return own, ()
    raised = _above(folders)
    shown = ", ".join(common[:4])
    if raised is None:
        note = f"the folders of all files are called {shown}; --class-level N takes others"
        return own, (f"classes by folder: {note}, 0 none",)
    depth, labels = raised
    above = escaped("/".join(next(p for p in folders if len(p) >= depth)[-depth:]))
    classes = len({label for label in labels if label})
    note = f"{classes} by the folders above {shown}, as in {above}; --class-level N takes others"
    return labels, (f"classes by folder: {note}",)


def _at(path: tuple[str, ...], level: int) -> str | None:
    if level == 0 or len(path) < abs(level):
        return None
    return path[level - 1] if level > 0 else path[level]


def _is_common(name: str) -> bool:
    return name.lower() in _SPLITS | _CONTENTS


def _above(folders: list[tuple[str, ...]]) -> tuple[int, list[str | None]] | None:
    """Returns the nearest level, counted from the file, that tells files apart, and its names."""
    for depth in range(2, max(map(len, folders)) + 1):
        labels = [_at(path, -depth) for path in folders]
        if all(_is_common(label) for label in labels if label):
            continue
        # Of `train/CLASS/images` and `val/images` the latter's files have no class.
        places = Counter(
            len(path)
            for path, label in zip(folders, labels, strict=True)
            if label and not _is_common(label)
        )
        labels = [
            None if label and _is_common(label) and len(path) not in places else label
            for path, label in zip(folders, labels, strict=True)
        ]
        return (depth, labels) if len(set(labels) - {None}) > 1 else None
    return None
