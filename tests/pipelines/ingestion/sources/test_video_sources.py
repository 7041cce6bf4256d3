"""Listing videos: what is one, lists, sidecars, labels, and folders that hold images too."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.sources import config, write
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.chunks import chunk_from_json, chunk_to_json
from pipelines.ingestion.reading.items import Item
from pipelines.ingestion.sources.registry import list_source, read_chunk
from pipelines.ingestion.sources.source_type import Listing


def names(listing: Listing) -> set[str]:
    return {Path(entry.path).name for chunk in listing.chunks for entry in chunk.entries}


def items_of(cfg: IngestConfig) -> list[Item]:
    listing = list_source(cfg)
    chunks = listing.chunks
    assert [chunk_from_json(chunk_to_json(chunk)) for chunk in chunks] == list(chunks)
    resolved = config(cfg.source, modality=listing.modality)
    return [item for chunk in chunks for item in read_chunk(chunk, resolved)]


def test_modality_is_what_is_found(tmp_path: Path) -> None:
    suffixes = ("mp4", "mkv", "webm", "mov", "avi", "M4V", "gif")
    for suffix in suffixes:
        write(tmp_path / "v" / f"a.{suffix}")
    write(tmp_path / "v" / "README.md")
    write(tmp_path / "v" / "LICENSE")
    write(tmp_path / "v" / "d41d8cd9", b"\0\0\0\x20ftypisom")
    listing = list_source(config(tmp_path / "v"))
    assert listing.modality == "video"
    assert names(listing) == {*(f"a.{suffix}" for suffix in suffixes), "d41d8cd9"}
    assert (listing.num_items, listing.ignored) == (8, 2)
    write(tmp_path / "i" / "a.gif")
    write(tmp_path / "i" / "no_suffix", bytes(8))
    assert list_source(config(tmp_path / "i")).modality == "image"
    assert list_source(config(tmp_path / "i", modality="video")).modality == "video"


def test_images_and_videos_together_need_a_word(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4")
    write(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="--modality: both"):
        list_source(config(tmp_path))
    assert names(list_source(config(tmp_path, modality="video"))) == {"a.mp4"}
    assert names(list_source(config(tmp_path, modality="image"))) == {"a.jpg"}


def test_no_video_where_one_was_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="--source: no videos found"):
        list_source(config(tmp_path, modality="video"))
    write(tmp_path / "tars" / "a.tar")
    with pytest.raises(ValueError, match="--modality: videos are read from folders and lists"):
        list_source(config(tmp_path / "tars", modality="video"))


def test_sidecars_belong_to_their_file(tmp_path: Path) -> None:
    for name in ("a.b.mp4", "a.b.actions.npy", "a.b.states.npy", "c.mkv", "c.states.npy", "d.mp4"):
        write(tmp_path / "x" / name, name.encode())
    write(tmp_path / "x" / "e.actions.npy")  # of no file
    listing = list_source(config(tmp_path))
    found = {Path(e.path).name: e.sidecars for c in listing.chunks for e in c.entries}
    assert found == {"a.b.mp4": ("actions", "states"), "c.mkv": ("states",), "d.mp4": ()}
    assert (listing.num_items, listing.ignored) == (3, 1)
    items = {Path(item.uri).name: item for item in items_of(config(tmp_path))}
    assert items["a.b.mp4"].sidecars == (
        ("actions", b"a.b.actions.npy"),
        ("states", b"a.b.states.npy"),
    )
    assert {item.label for item in items.values()} == {"x"}


def test_changed_sidecar_changes_the_chunk(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4")
    before = list_source(config(tmp_path)).chunks
    write(tmp_path / "a.states.npy")
    assert list_source(config(tmp_path)).chunks != before


@pytest.mark.parametrize("header", ["path,label\n", "path\n", ""])
def test_list_of_paths_and_labels(header: str, tmp_path: Path) -> None:
    for name in ("lists/a.mp4", "far/b.mp4", "lists/a.states.npy", "lists/other.mp4"):
        write(tmp_path / name, name.encode())
    rows = f"a.mp4,dog\n../far/b.mp4,3\n\nfile://{tmp_path}/far/b.mp4\nlost.mp4,-1\n"
    path = write(tmp_path / "lists" / "train.csv", (header + rows).encode())
    items = items_of(config(path))
    found = sorted((Path(i.uri).name, str(i.label), i.problem and i.problem[0]) for i in items)
    assert found == [
        ("a.mp4", "dog", None),
        ("b.mp4", "3", None),
        ("b.mp4", "None", None),
        ("lost.mp4", "None", "unreadable"),
    ]
    by_name = {Path(item.uri).name: item for item in items}
    assert by_name["a.mp4"].sidecars == (("states", b"lists/a.states.npy"),)
    assert {type(item.label) for item in items} == {str, int, type(None)}


def test_list_of_images(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", b"a")
    path = write(tmp_path / "all.csv", b"a.jpg,cat\n")
    (item,) = items_of(config(path))
    assert (item.data, item.label) == (b"a", "cat")


def test_list_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "a, b.mp4", b"a")
    path = write(tmp_path / "all.csv", '\ufeffpath,label\n"a, b.mp4","x, y"\n'.encode())
    (item,) = items_of(config(path))
    assert (Path(item.uri).name, item.label, item.problem) == ("a, b.mp4", "x, y", None)


def test_empty_list_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--source: the list"):
        list_source(config(write(tmp_path / "all.csv", b"path,label\n")))


def test_s3_prefix_with_sidecars_and_a_list(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    fs = fsspec.filesystem("s3")
    fs.mkdir("videos")
    for name in ("cat/a.mp4", "cat/a.states.npy", "b.mkv", "c.mp4"):
        fs.pipe_file(f"videos/raw/{name}", name.encode())
    others = {"README": b"text", "cat_$folder$": b"", "x.dat": b"\0", "d41d8cd9": b"\x1aE\xdf\xa3"}
    for name, data in others.items():
        fs.pipe_file(f"videos/raw/{name}", data)
    local = write(tmp_path / "local.mp4", b"local")
    fs.pipe_file("videos/raw/all.csv", f"cat/a.mp4,1\nfile://{local},2\n".encode())
    seen = {}
    listing = list_source(config("s3://videos/raw"))
    assert listing.passed_over == (("without a suffix", 2), (".csv", 1), (".dat", 1))
    for chunk in listing.chunks:
        for item in read_chunk(chunk, config("", modality="video")):
            seen[item.uri] = (Path(item.path).read_bytes(), item.label, item.sidecars)
    assert seen == {
        "s3://videos/raw/cat/a.mp4": (
            *(b"cat/a.mp4", "cat"),
            (("states", b"cat/a.states.npy"),),
        ),
        "s3://videos/raw/b.mkv": (b"b.mkv", None, ()),
        "s3://videos/raw/d41d8cd9": (others["d41d8cd9"], None, ()),
        "s3://videos/raw/c.mp4": (b"c.mp4", None, ()),
    }
    labels = {item.uri: item.label for item in items_of(config("s3://videos/raw/all.csv"))}
    assert labels == {"s3://videos/raw/cat/a.mp4": 1, str(local): 2}
