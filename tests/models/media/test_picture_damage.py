"""Damaged metadata is ignored, damaged pixels are refused, and every refusal says why."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from helpers.models.picture_files import SIGNATURE, chunk, encode, tiff, with_chunks, with_segment
from models.media.images import decode_image, open_image
from models.media.pictures.errors import ImageError
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.preparing.images import prepare_image

CFG = IngestConfig(source="/x", out="/y")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
VALUES = np.asarray(PICTURE)
PNG = encode(PICTURE, "PNG")
JPEG = encode(PICTURE, "JPEG", quality=95)
LONG = zlib.compress(b"x" * 3_000_000)

CHUNKS = {
    "long zTXt": chunk(b"zTXt", b"k\0\0" + LONG),
    "long iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "gAMA checksum": chunk(b"gAMA", struct.pack(">I", 45455), checksum=1),
    "tEXt checksum": chunk(b"tEXt", b"a\0b", checksum=1),
    "tIME checksum": chunk(b"tIME", bytes(7), checksum=1),
    "unknown": chunk(b"abCd", b"zz", checksum=2),
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0"),
    "short pHYs": chunk(b"pHYs", b"\0"),
    "empty sRGB": chunk(b"sRGB"),
    "short tRNS": chunk(b"tRNS", b"\0"),
    "zTXt method": chunk(b"zTXt", b"k\0\5zz"),
    "iCCP method": chunk(b"iCCP", b"n\0\7zz"),
    "iCCP without a name": chunk(b"iCCP", b"nn"),
    "long iCCP": chunk(b"iCCP", b"n\0\0" + LONG),
    "short acTL": chunk(b"acTL", b"\0"),
    "wrong fcTL": chunk(b"acTL", struct.pack(">II", 2, 0))
    + chunk(b"fcTL", bytes([0] * 3 + [5] * 23)),
    "eXIf": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\5"),
    "exif as text": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  10\nzz\n"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_damaged_chunk_beside_the_pixels_costs_nothing(name: str, place: str) -> None:
    data = with_chunks(PNG, **{place: CHUNKS[name]})
    np.testing.assert_array_equal(np.asarray(decode_image(data)), VALUES)
    assert open_image(data).size == PICTURE.size


def test_much_text_in_many_chunks_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 100)  # 64 MiB would take seconds
    data = with_chunks(PNG, chunk(b"tEXt", b"k\0" + b"y" * 60) * 2)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), VALUES)


def test_metadata_that_pillow_cannot_read_is_not_stored() -> None:
    """Other decoders may fail on it too. The rest of the file is unchanged."""
    data = with_chunks(PNG, CHUNKS["long zTXt"])
    stored = prepare_image(data, CFG).data
    assert stored == PNG
    assert prepare_image(with_chunks(PNG, chunk(b"tEXt", b"a\0b")), CFG).data != PNG  # as it came


def test_orientation_and_transparency_survive_the_repair() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    side = exif.tobytes().removeprefix(b"Exif\0\0")
    good = chunk(b"tRNS", struct.pack(">3H", *VALUES[0, 0].tolist())) + chunk(b"eXIf", side)
    seen = np.asarray(decode_image(with_chunks(PNG, CHUNKS["gAMA checksum"] + good)))
    hidden = (VALUES[0, 0] == VALUES).all(axis=-1, keepdims=True)
    np.testing.assert_array_equal(seen, np.rot90(np.where(hidden, 0, VALUES), -1))
    broken = with_segment(with_segment(JPEG, 0xE1, exif.tobytes()), 0xED, b"Photoshop 3.0\x008BIM")
    np.testing.assert_array_equal(np.asarray(decode_image(broken)), np.rot90(jpeg_pixels(), -1))


def jpeg_pixels() -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(JPEG)))


SEGMENTS = {
    "Photoshop, cut": (0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
    "Exif of nonsense": (0xE1, b"Exif\0\0junkjunk"),
    "Exif, cut": (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x05\1"),
    "Exif, empty": (0xE1, b"Exif\0\0"),
    "Exif, far away": (0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "ICC, short": (0xE2, b"ICC_PROFILE\0\1"),
    "ICC, a part missing": (0xE2, b"ICC_PROFILE\0\1\3junk"),
    "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"),
    "MPF": (0xE2, b"MPF\0MM\0*\0\0\0\x08\0\3\xb0\0" + b"\0" * 40),
    "JFIF, short": (0xE0, b"JFIF"),
    "Adobe, short": (0xEE, b"Adobe"),
    "a length of nothing": (0xE5, b""),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_damaged_segment_beside_the_pixels_costs_nothing(name: str) -> None:
    marker, body = SEGMENTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of corrupt Exif
        data = with_segment(JPEG, marker, body, length=0 if name.startswith("a length") else None)
        np.testing.assert_array_equal(np.asarray(decode_image(data)), jpeg_pixels())


def test_damaged_metadata_of_other_formats_cost_nothing() -> None:
    webp = encode(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0junk", xmp=b"<<", icc_profile=b"x")
    np.testing.assert_array_equal(np.asarray(decode_image(webp)), VALUES)
    exif = Image.Exif()
    exif[0x010F] = "maker"
    avif = encode(PICTURE, "AVIF", quality=95, exif=exif.tobytes())
    at = max(avif.find(b"MM\0*"), avif.find(b"II*\0"))
    for junk in (b"junkjunk", avif[at : at + 4] + b"\xff\xff\xff\xff"):
        seen = np.asarray(decode_image(avif[:at] + junk + avif[at + 8 :]))
        np.testing.assert_array_equal(seen, np.asarray(decode_image(avif)))


RGB_TIFF: dict[int, tuple[int, list[int]]] = {258: (3, [8, 8, 8]), 262: (3, [2]), 277: (3, [3])}


@pytest.mark.parametrize(
    "tag",
    [
        {34665: (4, [10_000_000])},
        {34853: (4, [99_999])},
        {330: (4, [5])},
        {34675: (3, [1, 2, 3])},
        {700: (3, [1, 2, 3])},
        {282: (3, [0]), 283: (3, [0]), 296: (3, [9])},
    ],
    ids=["Exif far away", "GPS far away", "subfile", "ICC of numbers", "XMP of numbers", "dpi"],
)
def test_damaged_tags_of_a_tiff_cost_nothing(tag: dict[int, tuple[int, list[int]]]) -> None:
    seen = np.asarray(decode_image(tiff(VALUES, {**RGB_TIFF, **tag})))
    np.testing.assert_array_equal(seen, VALUES)


def test_what_follows_the_picture_does_not_matter() -> None:
    for data in (PNG + b"garbage" * 99, PNG[:-12], PNG[:-3], with_chunks(PNG, b"", PNG)[:-40]):
        np.testing.assert_array_equal(np.asarray(decode_image(data)), VALUES)
    cut_in_text = with_chunks(PNG, b"", chunk(b"tEXt", b"a\0" + b"b" * 100))[:-60]
    np.testing.assert_array_equal(np.asarray(decode_image(cut_in_text)), VALUES)


@pytest.mark.parametrize(
    ("data", "reason", "said"),
    [
        (PNG[:29] + b"zzzz" + PNG[33:], "decode_error", "IHDR"),
        (with_chunks(PNG, chunk(b"PLTE", bytes(9), checksum=4)), "decode_error", "PLTE"),
        (PNG[: len(PNG) // 2], "truncated", "truncated"),
        (with_chunks(PNG[: len(PNG) // 2], CHUNKS["long zTXt"]), "truncated", "truncated"),
        (PNG[:20], "truncated", "Truncated"),
        (SIGNATURE, "truncated", ""),
        (encode(PICTURE, "GIF")[:9], "truncated", ""),
        (encode(PICTURE, "WEBP")[:60], "truncated", "shorter"),
        (encode(PICTURE, "BMP")[:200], "truncated", ""),
        (tiff(VALUES, {**RGB_TIFF, 277: (3, [5]), 258: (3, [8] * 5)}), "decode_error", "samples 5"),
        (tiff(VALUES, {**RGB_TIFF, 262: (3, [9])}), "decode_error", "photometric 9"),
        (tiff(VALUES, {**RGB_TIFF, 259: (3, [34712])}), "decode_error", "compression 34712"),
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "decode_error", "12-bit"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "not_an_image", "HEIC"),
        (b"8BPS\0\1", "not_an_image", "Photoshop"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not_an_image", "Git LFS"),
        (b"BMW is a make of cars, and this is text", "not_an_image", "none of JPEG"),
        (b"P5 is text too", "not_an_image", "none of JPEG"),
    ],
)
def test_refusals_point_to_what_is_wrong(data: bytes, reason: str, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert said in caught.value.detail


def bilevel(width: int, height: int) -> bytes:
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND")


@pytest.fixture
def pillows_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A small limit, so that a picture beyond it is quick to make."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    return 100  # from here on an error


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM"])
def test_the_flag_alone_decides_how_many_pixels(kind: str, pillows_limit: int) -> None:
    data = encode(PICTURE, kind)
    most = PICTURE.width * PICTURE.height
    assert most > pillows_limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (most, most + 1, None):
            assert decode_image(data, max_pixels=limit).size == PICTURE.size
        with pytest.raises(ImageError, match="too_many_pixels: 40x24 is over the limit of 959"):
            decode_image(data, max_pixels=most - 1)


def test_others_in_the_process_keep_pillows_protection(pillows_limit: int) -> None:
    """One thread decodes under our limit while another opens a bomb under Pillow's."""
    from models.media.pictures.pixel_limit import pixel_limit

    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            Image.open(io.BytesIO(PNG))
        except Image.DecompressionBombError as error:
            caught.append(error)

    with pixel_limit(10_000):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert Image.open(io.BytesIO(PNG)).size == PICTURE.size
    assert len(caught) == 1
    elsewhere()
    assert len(caught) == 2
    assert pillows_limit == 2 * (Image.MAX_IMAGE_PIXELS or 0)
