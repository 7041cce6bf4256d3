"""Folders as they are: links, names that are not UTF-8, and files whose names say nothing."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ingest_helpers import run_quietly, settings
from PIL import Image

from benchmarks.ingest import encoded, noise
from pipelines.config import IngestConfig
from pipelines.ingestion.choosing import shortened, told
from pipelines.ingestion.media import FIRST_LOOKS, content_of, suffixes
from pipelines.ingestion.names import escaped
from pipelines.readers import Item, read_chunk
from pipelines.shards import read_manifest, read_rows
from pipelines.sources import Chunk, Entry, Listing, list_source
from pipelines.staging import chunk_key, chunk_to_json


def config(source: object, **changes: object) -> IngestConfig:
    return IngestConfig(source=str(source), out="/nowhere/out", **changes)  # type: ignore[arg-type]


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


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

    The video's key is that of commit ae55864. The image's is of the commit that first brought colour
    profiles to sRGB (8e790ca): pictures with one had other rows before.
    """
    chunk = chunk_to_json(Chunk("folder", "file", (Entry("/data/cat/a.jpg", 5, "1.5", "cat"),)))
    keys = [
        chunk_key(chunk, IngestConfig(source="/data", out="/out", modality=modality))  # type: ignore[arg-type]
        for modality in ("image", "video")
    ]
    assert keys == ["cd38a8f403dc46cb5d4392a81b0734a0", "adb75e761d6e1401098deb689c97fc8f"]


# -------------------------------------------------------------------------------- contents


def picture(target: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    noise(0).save(buffer, target, **options)
    return buffer.getvalue()


def test_every_suffix_of_what_the_decoder_reads_is_an_images() -> None:
    common = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff"
    others = ".avif .jp2 .j2k .ppm .pgm .pbm .pnm .apng .dib .mpo"
    assert suffixes("image") >= {*common.split(), *others.split()}
    assert not suffixes("image") & {".eps", ".pdf", ".svg", ".ico", ".psd", ".mp4"}


@pytest.mark.parametrize("target", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "PPM", "JPEG2000"])
def test_pictures_are_known_by_their_content(target: str) -> None:
    assert content_of(picture(target)[:512]) == "image"
    assert content_of(picture(target)[:512], named=True) == "image"


@pytest.mark.parametrize(
    ("head", "content"),
    [
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "video"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01", "video"),
        (b"RIFF\x10\0\0\0AVI LIST", "video"),
        (b"P2\n# grey\n2 2\n255\n0 1 2 3\n", "image"),
        (b"Python is a language\n", "text"),  # Pillow alone takes it for a PPM
        (b"BMW and other makes\n", "text"),
        ("Licen\u00e7a".encode("latin-1"), "text"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ""),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", ""),  # begins as some AVIF does
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "image"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", ""),  # a camera's raw file
        (b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42", ""),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "video"),
        (b"\x7fELF\x02\x01\x01\0", ""),
        (b"", ""),
    ],
)
def test_content_by_first_bytes(head: bytes, content: str) -> None:
    assert content_of(head) == content


def test_tiff_counts_only_where_the_name_says_nothing_else() -> None:
    """Cameras' raw files begin like TIFF and hold a thumbnail first."""
    assert content_of(picture("TIFF")[:512]) == "image"
    assert content_of(picture("TIFF")[:512], named=True) != "image"


def test_files_of_unknown_suffix_are_looked_into(tmp_path: Path) -> None:
    for number in range(3 * FIRST_LOOKS):
        write(tmp_path / f"{number}.jpg_large", picture("JPEG"))
        write(tmp_path / f"{number}.txt", b"a caption")
        write(tmp_path / f"{number:032x}", picture("PNG"))
    write(tmp_path / "notes.jpg_large", b"none of them")
    write(tmp_path / "raw.CR2", picture("TIFF"))
    for name in ("README", "LICENSE", "Makefile"):
        write(tmp_path / name, b"Python is a language\n")
    for name in ("c_$folder$", "_SUCCESS"):
        write(tmp_path / name, b"")
    write(tmp_path / "upload_that_failed", b"")
    write(tmp_path / "damaged", b"\0\1\2\3")
    listing = list_source(config(tmp_path))
    found = labels(listing, tmp_path)
    assert {"upload_that_failed", "damaged"} <= set(found)  # they may have been images
    assert len(found) == 6 * FIRST_LOOKS + 2 == listing.num_items
    assert listing.passed_over == (
        (".txt", 48),
        ("without a suffix", 5),
        (".cr2", 1),
        (".jpg_large", 1),
    )
    total = sum(1 for _ in tmp_path.iterdir())
    assert listing.ignored + len(found) == total


def test_only_the_commonest_suffixes_are_told() -> None:
    counts = tuple((f".{letter}", 20 - number) for number, letter in enumerate("abcdefghij"))
    assert shortened(counts) == (*counts[:8], ("others", 12 + 11))
    assert shortened(counts[:8]) == counts[:8]
    assert told(counts) == (
        "155 files there: 20 .a, 19 .b, 18 .c, 17 .d, 16 .e, 15 .f, 14 .g, 13 .h, 23 others"
    )


def test_dots_in_names_are_no_suffixes(tmp_path: Path) -> None:
    names = (
        "a.jpg?size=large",
        "Screenshot 2020.01.02 at 10.30",
        "1.2.840.113619.78",
        "x.PNG copy",
    )
    for name in names:
        write(tmp_path / name, picture("TIFF" if "840" in name else "PNG"))
    write(tmp_path / "notes v1.0", b"text")
    write(tmp_path / "archive.zip.001", bytes(9))  # no more than other archives
    listing = list_source(config(tmp_path))
    assert set(labels(listing, tmp_path)) == set(names)
    assert listing.passed_over == ((".0", 1), (".001", 1))


def test_a_folder_without_one_known_suffix_is_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "v" / "a", b"\0\0\0\x20ftypisom\0\0")
    write(tmp_path / "v" / "README", b"text")
    assert list_source(config(tmp_path / "v")).modality == "video"
    write(tmp_path / "i" / "a.dat", picture("WEBP"))
    assert list_source(config(tmp_path / "i")).modality == "image"
    write(tmp_path / "none" / "README", b"text")
    write(tmp_path / "none" / "a.md", b"text")
    with pytest.raises(ValueError, match=r"no images, .*\(2 files there: 1 \.md, 1 without a suf"):
        list_source(config(tmp_path / "none"))


@pytest.mark.parametrize(
    ("target", "suffix"), [("AVIF", "avif"), ("JPEG2000", "jp2"), ("PPM", "ppm"), ("PPM", "PGM")]
)
def test_formats_that_are_not_of_the_web_are_ingested(
    target: str, suffix: str, in_process: None, tmp_path: Path
) -> None:
    image = noise(0).convert("L") if suffix == "PGM" else noise(0)
    image.save(tmp_path / "x.bin", target)
    write(tmp_path / "raw" / f"a.{suffix}", (tmp_path / "x.bin").read_bytes())
    run_quietly(settings(tmp_path / "raw", tmp_path / "out"))
    (row,) = read_rows(tmp_path / "out").to_pylist()
    with Image.open(io.BytesIO(row["image"])) as stored:
        assert stored.format == "PNG"
        assert stored.size == image.size


# -------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("source", "way_out"),
    [
        ("http://host/a.tar", "download it"),
        ("gs://bucket/x", "only local paths and s3://"),
        ("S3://bucket/x", "write s3:// in lower case"),
        ("rtsp://camera/1", "add --follow"),
        ("nonsense://x", "only local paths and s3://"),
    ],
)
def test_addresses_that_are_not_read_are_refused_by_name(source: str, way_out: str) -> None:
    with pytest.raises(ValueError, match=way_out) as error:
        list_source(config(source))
    assert str(error.value).startswith("--source: ")
    assert source in str(error.value)
