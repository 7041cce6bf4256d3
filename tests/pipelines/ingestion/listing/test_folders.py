"""Folders as they are: links, names that are not UTF-8, and addresses that are no folders."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.data.ingest import encoded, noise
from helpers.pipelines.ingestion import run_quietly, settings
from helpers.pipelines.sources import config, write
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import read_manifest, read_rows
from pipelines.ingest import ingest
from pipelines.ingestion.entries.chunks import Chunk, chunk_to_json
from pipelines.ingestion.entries.entries import Entry
from pipelines.ingestion.reading.items import Item
from pipelines.ingestion.sources.registry import list_source, read_chunk
from pipelines.ingestion.sources.source_type import Listing
from pipelines.ingestion.staging import chunk_key
from pipelines.runtime.names import escaped


def link(path: Path, target: str | Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def labels(listing: Listing, root: Path) -> dict[str, str | None]:
    entries = [entry for chunk in listing.chunks for entry in chunk.entries]
    return {entry.path.removeprefix(f"{root}/"): entry.label for entry in entries}


def items_of(cfg: IngestConfig) -> dict[str, Item]:
    listing = list_source(cfg)
    items = [item for chunk in listing.chunks for item in read_chunk(chunk, cfg)]
    assert len(items) == listing.num_items
    return {item.uri: item for item in items}


# -------------------------------------------------------------------------------- links


def test_linked_images_are_read_and_a_link_to_nothing_is_refused_alone(tmp_path: Path) -> None:
    write(tmp_path / "store" / "1", b"one")
    write(tmp_path / "set" / ".git" / "annex" / "objects" / "K1", b"two")
    link(tmp_path / "set" / "cat" / "a.jpg", "../../store/1")
    link(
        tmp_path / "set" / "dog" / "b.jpg", "../.git/annex/objects/K1"
    )  # what it leads to is hidden
    link(tmp_path / "set" / "dog" / "c.jpg", "b.jpg")  # a link to a link
    link(tmp_path / "set" / "dog" / "lost.jpg", "../.git/annex/objects/K2")
    link(tmp_path / "set" / "dog" / "circle.jpg", "circle.jpg")
    items = items_of(config(tmp_path / "set"))
    found = {Path(uri).name: (item.data, item.label) for uri, item in items.items()}
    good = {"a.jpg": (b"one", "cat"), "b.jpg": (b"two", "dog"), "c.jpg": (b"two", "dog")}
    assert {name: found[name] for name in good} == good
    bad = {Path(uri).name: item.problem for uri, item in items.items() if item.problem}
    assert {name: problem[0] for name, problem in bad.items()} == {
        "lost.jpg": "unreadable",
        "circle.jpg": "unreadable",
    }


def test_a_link_whose_target_changes_changes_the_chunk(tmp_path: Path) -> None:
    target = write(tmp_path / "store" / "1", b"one")
    link(tmp_path / "set" / "a.jpg", target)
    before = list_source(config(tmp_path / "set")).chunks
    assert list_source(config(tmp_path / "set")).chunks == before
    target.write_bytes(b"two")
    os.utime(target, (1, 1))  # of the same size
    after = list_source(config(tmp_path / "set")).chunks
    assert (after[0].entries[0].size, after[0].entries[0].tag) == (3, "1.0")
    assert after != before


def test_linked_folders_are_classes_like_others(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a" / "0.jpg")
    for name in ("0.jpg", "deep/1.jpg", ".hidden/2.jpg"):
        write(tmp_path / "elsewhere" / ".c" / name)
    link(tmp_path / "set" / "c", "../elsewhere/.c")
    write(tmp_path / "whole" / "x.jpg")
    link(tmp_path / "source", tmp_path / "set")  # the source itself is a link
    listing = list_source(config(tmp_path / "source"))
    assert labels(listing, tmp_path / "source") == {
        **{"a/0.jpg": "a", "c/0.jpg": "c"},
        "c/deep/1.jpg": "deep",
    }
    assert listing.notes == ()


def test_a_folder_is_walked_once_whatever_leads_to_it(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("real/0.jpg", "real/sub/1.jpg"):
        write(root / name)
    write(tmp_path / "far" / "near" / "2.jpg")
    link(root / "a_link", "real")  # before it in order, and yet the real name stays
    link(root / "real" / "up", "..")
    link(root / "real" / "sub" / "self", ".")
    link(root / "y", tmp_path / "far" / "near")
    link(root / "z", tmp_path / "far")  # holds what y has
    listing = list_source(config(root))
    assert labels(listing, root) == {"real/0.jpg": "real", "real/sub/1.jpg": "sub", "y/2.jpg": "y"}
    (note,) = listing.notes
    assert note.startswith(f"4 linked folders lead to what is in the source already: {root}/a_link")


def test_links_to_the_output_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jpg")
    write(tmp_path / "set" / "out" / "b.jpg")
    link(tmp_path / "set" / "latest", "out")
    cfg = IngestConfig(source=str(tmp_path / "set"), out=str(tmp_path / "set" / "out"))
    assert labels(list_source(cfg), tmp_path / "set") == {"a.jpg": None}


def test_a_store_of_contents_is_read_by_its_links(tmp_path: Path) -> None:
    """Hugging Face's cache: `blobs` has the files, `snapshots` the names."""
    root = tmp_path / "datasets--x--pets"
    for number in range(3):
        write(root / "blobs" / f"{number:064x}", b"\xff\xd8\xff" + bytes([number] * 9))
    write(root / "refs" / "main", b"0123456789abcdef")
    blobs = "../../../blobs"
    link(root / "snapshots" / "01ab" / "cat" / "0.jpg", f"{blobs}/{0:064x}")
    link(root / "snapshots" / "01ab" / "dog" / "1.jpg", f"{blobs}/{1:064x}")
    listing = list_source(config(root))
    assert labels(listing, root) == {
        "snapshots/01ab/cat/0.jpg": "cat",
        "snapshots/01ab/dog/1.jpg": "dog",
        f"blobs/{2:064x}": "blobs",  # nothing names it
    }
    assert listing.passed_over == (("without a suffix", 1),)  # refs/main
    assert listing.notes == ("2 files without a suffix are taken by the links to them alone",)


def test_globs_follow_links_that_they_match(tmp_path: Path) -> None:
    write(tmp_path / "data" / "real" / "0.jpg")
    write(tmp_path / "data" / "other" / "1.png")
    link(tmp_path / "data" / "linked", "real")
    link(tmp_path / "data" / "other" / "2.jpg", "../real/0.jpg")
    root = tmp_path / "data"
    for pattern, names in (
        ("l*/*.jpg", {"linked/0.jpg"}),
        ("*/*.jpg", {"real/0.jpg", "other/2.jpg"}),
        ("**/*.jpg", {"real/0.jpg", "other/2.jpg"}),
        ("other/[12].*", {"other/1.png", "other/2.jpg"}),
    ):
        assert set(labels(list_source(config(root / pattern)), root)) == names, pattern


def test_a_folder_that_may_not_be_listed_is_one_refused_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jpg")
    write(tmp_path / "lost+found" / "b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:  # the tests may run as root, whom nothing is refused
        if str(path).rstrip("/").endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    items = items_of(config(tmp_path))
    assert items[f"{tmp_path}/lost+found"].problem == (
        "unreadable",
        "a folder that this user may not list",
    )
    assert items[f"{tmp_path}/a.jpg"].data == b"x"
    (note,) = list_source(config(tmp_path)).notes
    assert note == f"1 folders may not be listed by this user: {tmp_path}/lost+found, ..."
    with pytest.raises(ValueError, match=r"--source: .*lost\+found may not be listed"):
        list_source(config(tmp_path / "lost+found"))


# -------------------------------------------------------------------------------- names

FOREIGN = {
    "latin1": b"caf\xe9.png",
    "gbk": "\u732b".encode("gbk") + b".png",
    "shift_jis": "\u732b".encode("shift_jis") + b".png",
    "cut off": b"\xe7\x8c.png",
}


def test_escaped_changes_only_what_utf8_cannot_hold() -> None:
    assert escaped("caf\u00e9 \\xe9 \U0001f431.png") == "caf\u00e9 \\xe9 \U0001f431.png"
    assert escaped(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"
    assert escaped("\ud800 from JSON") == r"\ud800 from JSON"


@pytest.mark.parametrize("folder", [b"cat", b"Caf\xe9"], ids=["plain", "foreign class"])
def test_names_that_are_not_utf8_are_read_and_stored_escaped(
    folder: bytes, in_process: None, tmp_path: Path
) -> None:
    root = tmp_path / "raw"
    for number, name in enumerate([*FOREIGN.values(), b"plain.png"]):
        write(root / os.fsdecode(folder) / os.fsdecode(name), encoded(noise(number), "PNG"))
    write(root / os.fsdecode(b"bad\xff.png"), b"no picture")
    out = tmp_path / "out"
    run_quietly(settings(root, out))
    uris = {uri.rpartition("/")[2] for uri in read_rows(out)["source_uri"].to_pylist()}
    escapes = {name.decode(errors="backslashreplace") for name in FOREIGN.values()}
    assert uris == {*escapes, "plain.png"}
    manifest = read_manifest(out)
    assert manifest.classes == (folder.decode(errors="backslashreplace"),)
    (refused,) = pq.read_table(out / "quarantine.parquet").to_pylist()
    assert refused["source_uri"] == rf"{root}/bad\xff.png"
    before = (out / "manifest.json").stat().st_mtime_ns
    run_quietly(settings(root, out))  # up to date
    assert (out / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("flag", ["source", "out"])
def test_a_flag_that_is_not_utf8_is_refused_with_the_way_out(flag: str) -> None:
    """Ray passes the command line on as UTF-8."""
    with pytest.raises(ValueError, match=rf"--{flag}: 'caf.udce9' is not UTF-8: .* a link to it"):
        IngestConfig(**{"source": "a", "out": "b", flag: os.fsdecode(b"caf\xe9")})


def test_plain_folders_keep_the_keys_they_had() -> None:
    """Settings that come later must not ingest again what gives the same rows.

    The video's key is that of commit ae55864. The image's is of the commit that first brought
    colour profiles to sRGB (8e790ca): pictures with one had other rows before.
    """
    chunk = chunk_to_json(Chunk("folder", "file", (Entry("/data/cat/a.jpg", 5, "1.5", "cat"),)))
    keys = [
        chunk_key(chunk, IngestConfig(source="/data", out="/out", modality=modality))  # type: ignore[arg-type]
        for modality in ("image", "video")
    ]
    assert keys == ["cd38a8f403dc46cb5d4392a81b0734a0", "adb75e761d6e1401098deb689c97fc8f"]


# -------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("source", "way_out"), [("http://127.0.0.1:9/a.tar", "download it"), ("rtsp://x/1", "--follow")]
)
def test_what_is_no_place_of_files_is_refused_before_it_is_asked(
    source: str, way_out: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"--source: {source} is a .*{way_out}"):
        ingest(settings(source, tmp_path / "out"))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "way_out"),
    [
        ("http://host/a.tar", "download it"),
        ("gs://bucket/x", "pip install gcsfs"),
        ("S3://bucket/x", "nothing here reads S3://; write s3://"),
        ("rtsp://camera/1", "add --follow"),
        ("nonsense://x", "nothing here reads nonsense://"),
    ],
)
def test_addresses_that_are_not_read_are_refused_by_name(source: str, way_out: str) -> None:
    with pytest.raises(ValueError, match=way_out) as error:
        list_source(config(source))
    assert str(error.value).startswith("--source: ")
    assert source in str(error.value)
