"""Which files are images or videos, where their names do not say it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.data.ingest import noise
from helpers.pipelines.ingestion import run_quietly, settings
from helpers.pipelines.sources import config, write
from pipelines.dataset.shards import read_rows
from pipelines.ingestion.listing.choosing import shortened, told
from pipelines.ingestion.listing.media import FIRST_LOOKS, content_of, suffixes
from pipelines.ingestion.sources.registry import list_source
from pipelines.ingestion.sources.source_type import Listing


def labels(listing: Listing, root: Path) -> dict[str, str | None]:
    entries = [entry for chunk in listing.chunks for entry in chunk.entries]
    return {entry.path.removeprefix(f"{root}/"): entry.label for entry in entries}


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
