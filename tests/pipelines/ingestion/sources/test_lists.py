"""From lists, and from metadata files in folders, to the files they name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.data.ingest import encoded, noise
from helpers.pipelines.ingestion import run_quietly, settings
from helpers.pipelines.sources import config, write
from pipelines.dataset.shards import read_manifest, read_rows
from pipelines.ingestion.sources.registry import list_source, read_chunk
from pipelines.ingestion.sources.source_type import Listing


def entries(listing: Listing) -> dict[str, str | None]:
    """Returns the labels of the files that are there, by name."""
    found = [entry for chunk in listing.chunks for entry in chunk.entries]
    return {entry.path.rpartition("/")[2]: entry.label for entry in found if entry.size >= 0}


def test_links_in_a_list_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "store" / "1", b"one")
    (tmp_path / "a.jpg").symlink_to("store/1")
    (tmp_path / "lost.jpg").symlink_to("store/2")
    (tmp_path / "linked").symlink_to("store")
    path = write(tmp_path / "all.csv", b"a.jpg,cat\nlost.jpg,dog\nlinked/1,cow\n")
    listing = list_source(config(path))
    items = [item for chunk in listing.chunks for item in read_chunk(chunk, config(path))]
    found = {item.uri.removeprefix(f"{tmp_path}/"): item for item in items}
    assert (found["a.jpg"].data, found["a.jpg"].label) == (b"one", "cat")
    assert (found["linked/1"].data, found["linked/1"].label) == (b"one", "cow")
    assert found["lost.jpg"].problem == ("unreadable", "no regular file, or a link to nothing")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt", "lst", "jsonl", "json"])
def test_every_suffix_of_lists_is_one(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    data = b'{"path": "a.jpg", "label": 3}' if "json" in suffix else b"a.jpg\t3\n"
    listing = list_source(config(write(tmp_path / f"all.{suffix}", data)))
    assert listing.kind == "list"
    assert entries(listing) == {"a.jpg": "3"}


def test_a_list_of_any_name_where_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    path = write(tmp_path / "LIST", b"a.jpg|cat\n")
    assert entries(list_source(config(path, format="list"))) == {"a.jpg": "cat"}


def test_what_a_list_names_is_an_item_whatever_its_suffix(tmp_path: Path) -> None:
    for name in ("a.ppm", "b.dat", "c", "d.mp4"):
        write(tmp_path / name)
    path = write(tmp_path / "all.csv", b"a.ppm\nb.dat\nc\nd.mp4\n")
    listing = list_source(config(path, modality="image"))
    assert set(entries(listing)) == {"a.ppm", "b.dat", "c"}
    assert listing.passed_over == ((".mp4", 1),)


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        (b".\\0.png,cat\n", b"0.png"),
        (b"train\\cat\\0.png,cat\n", b"train/cat/0.png"),
        ("caf\u00e9.png,cat\n".encode("cp1252"), "caf\u00e9.png".encode()),
        ("caf\u00e9.png,cat\n".encode("latin-1"), b"caf\xe9.png"),  # neither is UTF-8
        ("\u732b.png,cat\n".encode("gbk"), "\u732b.png".encode("gbk")),
        ("caf\u00e9.png,cat\n".encode("utf-16"), "caf\u00e9.png".encode()),
        (b"\xef\xbb\xbfpath,label\r\na.png,cat\r\n", b"a.png"),
        ("caf\u00e9.png,cat\n".encode(), "cafe\u0301.png".encode()),  # as a Mac has it
        ("cafe\u0301.png,cat\n".encode(), "caf\u00e9.png".encode()),
        (b"back\\slash.png,cat\n", b"back\\slash.png"),  # a name may hold one
        (b"a%20b/caf%C3%A9.png,cat\n", "a b/caf\u00e9.png".encode()),
        (b"50%25.png,cat\n", b"50%25.png"),  # likewise
    ],
)
def test_names_as_other_systems_write_them(listed: bytes, there: bytes, tmp_path: Path) -> None:
    file = write(tmp_path / os.fsdecode(there), b"it")
    listing = list_source(config(write(tmp_path / "all.csv", listed)))
    ((entry,),) = (chunk.entries for chunk in listing.chunks)
    assert (entry.path, entry.size, entry.label) == (str(file), 2, "cat")


def test_a_list_of_files_that_are_not_there_says_where_they_were_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "lists" / "all.csv", b"path,label\nimages/0.jpg,1\nimages/1.jpg,2\n")
    with pytest.raises(ValueError, match="none is there") as error:
        list_source(config(path))
    assert f"--source: of the 2 files that {path} names" in str(error.value)
    assert f"'images/0.jpg', was looked for at {tmp_path}/lists/images/0.jpg" in str(error.value)


def test_addresses_in_a_list_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", b"http://host/a.jpg,1\n")
    with pytest.raises(ValueError, match=r"http://host/a\.jpg is a web address"):
        list_source(config(path))


def test_named_columns_of_a_list(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    path = write(tmp_path / "all.csv", b"where,breed,x\na.jpg,pug,1\n")
    cfg = config(path, image_column="where", label_column="breed")
    listing = list_source(cfg)
    assert entries(listing) == {"a.jpg": "pug"}
    assert listing.notes == ("columns of all.csv that are not read: x",)
    with pytest.raises(ValueError, match=r"--label-column: .*'bred' \(it has where, breed, x\)"):
        list_source(config(path, label_column="bred"))


# -------------------------------------------------------------------------------- metadata files


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_metadata_gives_the_labels_of_a_folder(form: str, tmp_path: Path) -> None:
    rows = {"train": [("0.jpg", 3), ("deep/1.jpg", 0), ("gone.jpg", 1)], "test": [("0.jpg", 1)]}
    for split, named in rows.items():
        if form == "csv":
            text = "file_name,label,text\n" + "".join(f"{n},{c},a b\n" for n, c in named)
        else:
            lines = ({"file_name": name, "label": label} for name, label in named)
            text = "\n".join(map(json.dumps, lines))
        write(tmp_path / split / f"metadata.{form}", text.encode())
        for name, _ in named:
            if name != "gone.jpg":
                write(tmp_path / split / name)
    write(tmp_path / "test" / "unnamed.jpg")
    listing = list_source(config(tmp_path))
    found = {
        e.path.removeprefix(f"{tmp_path}/"): e.label for c in listing.chunks for e in c.entries
    }
    assert found == {
        **{"train/0.jpg": "3", "train/deep/1.jpg": "0"},
        **{"test/0.jpg": "1", "test/unnamed.jpg": None},
    }
    items = [item for c in listing.chunks for item in read_chunk(c, config(tmp_path))]
    assert {item.label for item in items} == {3, 0, 1, None}  # indices, as a list's
    told = "; ".join(listing.notes)
    assert f"1 files that {tmp_path}/train/metadata.{form} names are not there" in told
    assert "1 files are in no metadata file: unlabelled" in told
    assert ("text" in told) == (form == "csv")
    assert entries(list_source(config(tmp_path, class_level=1)))["unnamed.jpg"] == "test"


def test_metadata_without_labels_leaves_the_folders_names(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "0.jpg")
    write(tmp_path / "metadata.csv", b"file_name,text\ncat/0.jpg,a cat\n")
    listing = list_source(config(tmp_path))
    assert (listing.kind, entries(listing)) == ("folder", {"0.jpg": "cat"})
    assert listing.notes == (
        "columns of metadata.csv that are not read: text; --label-column names the one with labels",
    )
    write(tmp_path / "metadata.csv", b"")  # another program's
    assert entries(list_source(config(tmp_path))) == {"0.jpg": "cat"}


# -------------------------------------------------------------------------------- class folders


def test_tiny_imagenet_as_it_comes(tmp_path: Path) -> None:
    for wnid in ("n01", "n02"):
        write(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        write(tmp_path / "train" / wnid / f"{wnid}_boxes.txt", b"text")  # beside, no item
    write(tmp_path / "val" / "images" / "val_0.JPEG")
    write(tmp_path / "wnids.txt", b"n01\nn02\n")
    listing = list_source(config(tmp_path))
    assert entries(listing) == {"n01_0.JPEG": "n01", "n02_0.JPEG": "n02", "val_0.JPEG": None}
    assert listing.passed_over == ((".txt", 3),)
    assert listing.notes[0].startswith("classes by folder: 2 by the folders above images")
    assert entries(list_source(config(tmp_path, class_level=1)))["n01_0.JPEG"] == "train"
    assert set(entries(list_source(config(tmp_path, class_level=0))).values()) == {None}


@pytest.mark.parametrize("metadata", [b"", b"file_name,label\ncat/0.jpg,1\n"])
def test_a_label_column_that_a_folder_lacks_is_an_error(metadata: bytes, tmp_path: Path) -> None:
    write(tmp_path / "cat" / "0.jpg")
    if metadata:
        write(tmp_path / "metadata.csv", metadata)
    with pytest.raises(ValueError, match=r"--label-column: .*metadata\.csv"):
        list_source(config(tmp_path, label_column="breed"))


def test_flags_of_one_kind_of_source_go_with_no_other(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    path = write(tmp_path / "all.csv", b"a.jpg,1\n")
    with pytest.raises(ValueError, match="--class-level: goes with folders of files"):
        list_source(config(path, class_level=1))
    with pytest.raises(ValueError, match=r"--image-member: goes with tars, and .* is a list"):
        list_source(config(path, image_member=("jpg",)))


def test_a_whole_run_over_a_list_of_another_system(in_process: None, tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "bilder" / f"{number}.png", encoded(noise(number), "PNG"))
    text = "Nr;Dateiname;Klasse\r\n" + "".join(f"{n};bilder\\{n}.png;\u00c4\r\n" for n in range(4))
    path = write(tmp_path / "liste.csv", text.encode("cp1252"))
    run_quietly(settings(path, tmp_path / "out", label_column="Klasse"))
    assert read_manifest(tmp_path / "out").classes == ("\u00c4",)
    assert read_rows(tmp_path / "out")["label"].to_pylist() == [0] * 4
