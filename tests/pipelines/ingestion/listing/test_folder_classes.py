"""Which folder is the class, in the layouts that data sets come in."""

from __future__ import annotations

import pytest

from pipelines.ingestion.listing.folder_classes import folder_labels

TINY = ["train/n01/images/0.JPEG", "train/n02/images/0.JPEG"]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat/0.jpg", "dog/0.jpg", "x.jpg"], ["cat", "dog", None]),
        (["train/cat/0.jpg", "test/dog/0.jpg"], ["cat", "dog"]),
        (TINY, ["n01", "n02"]),  # Tiny-ImageNet
        ([*TINY, "val/images/0.JPEG", "test/images/1.JPEG"], ["n01", "n02", None, None]),
        ([*TINY, "val/0.jpg"], ["n01", "n02", None]),
        (["cat/train/0.jpg", "cat/test/1.jpg", "dog/test/2.jpg"], ["cat", "cat", "dog"]),
        (["cat/train/images/0.jpg", "dog/val/images/0.jpg"], ["cat", "dog"]),
        (["cat/Images/0.jpg", "dog/img/0.jpg"], ["cat", "dog"]),
        # A class that is called like a split, among others that are not (COCO's vehicle).
        (["bus/0.jpg", "train/0.jpg"], ["bus", "train"]),
        (["bus/images/0.jpg", "train/images/0.jpg"], ["bus", "train"]),
        (["cat/images/0.jpg", "cat/masks/0.png"], ["images", "masks"]),
        ([], []),
        (["0.jpg"], [None]),
    ],
)
def test_layouts(names: list[str], labels: list[str | None]) -> None:
    assert folder_labels(names)[0] == labels


def test_what_is_not_the_files_own_folder_is_said() -> None:
    assert folder_labels(["cat/0.jpg"])[1] == ()
    (note,) = folder_labels(TINY)[1]
    assert "2 by the folders above images, as in train/n01/images" not in note
    assert "2 by the folders above images, as in n01/images" in note
    assert "--class-level" in note


@pytest.mark.parametrize(
    "names",
    [
        ["images/0.jpg", "images/1.jpg"],
        ["train/0.jpg", "test/1.jpg"],
        ["train/images/0.jpg", "val/images/1.jpg"],  # YOLO
        ["set/train/images/0.jpg", "set/val/images/1.jpg"],
    ],
)
def test_folders_that_are_no_classes_are_said(names: list[str]) -> None:
    labels, (note,) = folder_labels(names)
    assert labels == [name.split("/")[-2] for name in names]  # as ever
    assert "--class-level N takes others, 0 none" in note


@pytest.mark.parametrize(
    ("level", "label"), [(1, "a"), (2, "b"), (3, "c"), (4, None), (-1, "c"), (-3, "a"), (0, None)]
)
def test_a_level_that_is_given(level: int, label: str | None) -> None:
    labels, notes = folder_labels(["a/b/c/0.jpg", "1.jpg"], level)
    assert labels == [label, None]
    assert notes == ()
