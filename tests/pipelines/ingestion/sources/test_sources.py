"""Listing and reading folders and lists, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.sources import config, items_of, labels_by_name, write
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.failures import raise_if_unreachable
from pipelines.ingestion.listing.chunking import CHUNK_ITEMS
from pipelines.ingestion.sources.registry import list_source, read_chunk
from pipelines.runtime.uris import absolute_uri

JPEG = b"\xff\xd8\xff\xe0" + bytes(8)  # as far as a look into a file goes


# -------------------------------------------------------------------------------- folders


def test_folder_labels_are_the_nearest_folders(tmp_path: Path) -> None:
    for name in ("a.jpg", "cat/b.png", "train/dog/c.webp", "train/cat/no_suffix"):
        write(tmp_path / name, JPEG)
    assert labels_by_name(items_of(config(tmp_path))) == {
        **{"a.jpg": None, "b.png": "cat"},
        **{"c.webp": "dog", "no_suffix": "cat"},
    }


def test_folder_passes_over_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("a.JPG", "README.md", ".DS_Store", ".cache/x.jpg", "labels.json", "out/old.jpg"):
        write(tmp_path / name)
    cfg = IngestConfig(source=str(tmp_path), out=str(tmp_path / "out"))
    listing = list_source(cfg)
    assert (listing.num_items, listing.ignored) == (1, 2)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["part-0.snappy.parquet", "_SUCCESS"], "parquet"),
        (["a.tar", "LICENSE"], "webdataset"),
        (["a.tar", "b.parquet", "LICENSE"], "webdataset"),
        (["d41d8cd9", "README.md"], "folder"),
        (["a.tar", "d41d8cd9"], "webdataset"),
        (["a.jpg", "b.parquet", "_SUCCESS"], "folder"),
    ],
)
def test_auto_takes_names_without_a_suffix_last(
    names: list[str], kind: str, tmp_path: Path
) -> None:
    for name in names:
        write(tmp_path / name, JPEG if name == "d41d8cd9" else b"text")
    assert list_source(config(tmp_path)).kind == kind
    if "d41d8cd9" in names:  # asked for, it is an image
        assert list_source(config(tmp_path, format="folder")).kind == "folder"


def test_names_with_glob_characters_and_spaces_are_read(tmp_path: Path) -> None:
    names = ["a[1].jpg", "b*.jpg", "c d.jpg", "e?.jpg", "f#1.jpg", "\u00fc.jpg", "g::h.jpg"]
    for name in names:
        write(tmp_path / "x" / name, name.encode())
    items = items_of(config(tmp_path))
    assert {item.data.decode() for item in items} == set(names)
    assert all(item.uri.endswith(item.data.decode()) for item in items)


def test_two_colons_in_a_local_name_are_part_of_it(tmp_path: Path) -> None:
    write(tmp_path / "a::b" / "cat" / "x::1.png", b"x")
    assert [item.data for item in items_of(config(tmp_path / "a::b"))] == [b"x"]
    assert absolute_uri(f"{tmp_path}/o::ut/") == f"{tmp_path}/o::ut"


def test_glob_takes_only_what_it_matches(tmp_path: Path) -> None:
    for name in (".hidden/one/a.jpg", ".hidden/two/b.jpg", ".hidden/two/b.png"):
        write(tmp_path / name)
    items = items_of(config(tmp_path / ".hidden" / "*" / "*.jpg"))
    assert labels_by_name(items) == {"a.jpg": "one", "b.jpg": "two"}


def test_single_file_is_a_source(tmp_path: Path) -> None:
    items = items_of(config(write(tmp_path / "cat" / "a.jpg")))
    assert labels_by_name(items) == {"a.jpg": None}


def test_order_mixes_classes_and_does_not_depend_on_the_place(tmp_path: Path) -> None:
    def listed(root: Path) -> list[str]:
        for index in range(200):
            write(root / f"class{index % 2}" / f"{index:03d}.jpg")
        chunks = list_source(config(root)).chunks
        return [e.path.removeprefix(str(root)) for chunk in chunks for e in chunk.entries]

    order = listed(tmp_path / "here")
    assert order == listed(tmp_path / "there" / "deeper")
    first_half = [path.startswith("/class0") for path in order[:100]]
    assert 30 < sum(first_half) < 70


def test_new_file_changes_one_chunk(tmp_path: Path) -> None:
    for index in range(3 * CHUNK_ITEMS):
        write(tmp_path / f"{index}.jpg")
    before = set(list_source(config(tmp_path)).chunks)
    assert len(before) == 4
    write(tmp_path / "new.jpg")
    assert len(before - set(list_source(config(tmp_path)).chunks)) == 1


def test_large_files_are_not_read_and_lost_ones_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "large.jpg", bytes(101))
    write(tmp_path / "limit.jpg", bytes(100))
    gone = write(tmp_path / "gone.jpg")
    (tmp_path / "link.jpg").symlink_to("/nonexistent")
    cfg = config(tmp_path, max_bytes=100)
    chunks = list_source(cfg).chunks
    gone.unlink()
    items = {item.uri.rpartition("/")[2]: item for c in chunks for item in read_chunk(c, cfg)}
    assert items["limit.jpg"].problem is None
    assert items["large.jpg"].problem == ("too_many_bytes", "101 is over the limit of 100 bytes")
    assert items["gone.jpg"].problem == (
        "unreadable",
        "FileNotFoundError: No such file or directory",
    )
    assert items["link.jpg"].problem is not None
    assert items["link.jpg"].problem[0] == "unreadable"


def test_nothing_to_read_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--source: .*/missing does not exist"):
        list_source(config(tmp_path / "missing"))
    write(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"no images, .*\(1 files there: 1 \.txt\)"):
        list_source(config(tmp_path))
    write(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="no webdataset found"):
        list_source(config(tmp_path, format="webdataset"))


@pytest.mark.parametrize(
    "error", [ConnectionError(), TimeoutError(), OSError(16, "busy"), KeyError()]
)
def test_storage_failures_stop_the_job(error: Exception) -> None:
    with pytest.raises(type(error)):
        raise_if_unreachable(error)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "no"), FileNotFoundError(2, "no"), OSError(5, "no")]
)
def test_failures_of_one_object_do_not(error: Exception) -> None:
    raise_if_unreachable(error)
