"""One image as it will be stored: every format comes out right or is refused with its reason."""

from __future__ import annotations

import dataclasses
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.ingest import noise, png
from helpers.models.image_formats import FORMATS, RGB, exif, save
from models.media.images import decode_image
from models.media.pictures.errors import ImageError
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.preparing.images import prepare_image

CFG = IngestConfig(source="/x", out="/y")


def pixels(data: bytes) -> np.ndarray:
    """What a decoder sees that knows nothing of EXIF, colour spaces and bit depths."""
    image = Image.open(io.BytesIO(data))
    assert image.mode in ("RGB", "L")
    return np.asarray(image.convert("RGB")).astype(int)


IDS = [name for name, *_ in FORMATS]


@pytest.mark.parametrize(("name", "data", "expected", "tolerance", "kept"), FORMATS, ids=IDS)
def test_every_format_comes_out_right_for_any_decoder(
    name: str, data: bytes, expected: Image.Image, tolerance: int, kept: bool
) -> None:
    prepared = prepare_image(data, CFG)
    seen = pixels(prepared.data)
    assert (prepared.height, prepared.width) == seen.shape[:2] == expected.size[::-1]
    assert np.abs(seen - np.asarray(expected).astype(int)).mean() <= tolerance
    assert (prepared.data == data) == kept
    assert np.abs(np.asarray(decode_image(prepared.data)).astype(int) - seen).max() == 0


def test_animation_becomes_its_first_frame() -> None:
    data = save(RGB, "WEBP", save_all=True, append_images=[noise(1), noise(2)], lossless=True)
    prepared = prepare_image(data, CFG)
    assert getattr(Image.open(io.BytesIO(prepared.data)), "n_frames", 1) == 1
    assert np.abs(pixels(prepared.data) - np.asarray(RGB).astype(int)).mean() < 3


def test_16_bit_rgb_becomes_8_bit() -> None:
    """Pillow cannot write such a file, so it is put together here."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = png(7, 5, bits=16, body=zlib.compress(rows))
    prepared = prepare_image(data, CFG)
    assert prepared.data[24] == 8
    assert np.abs(pixels(prepared.data) - values / 257.0).max() <= 1


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((64, 48), 24, (32, 24)),
        ((48, 64), 24, (24, 32)),
        ((64, 48), 48, (64, 48)),
        ((64, 48), 200, (64, 48)),
    ],
)
def test_short_side(size: tuple[int, int], short: int, expected: tuple[int, int]) -> None:
    data = save(RGB.resize(size), "JPEG")
    prepared = prepare_image(data, dataclasses.replace(CFG, short_side=short))
    assert (prepared.width, prepared.height) == expected
    assert Image.open(io.BytesIO(prepared.data)).size == expected
    assert (prepared.data == data) == (size == expected)


def test_short_side_of_a_large_rotated_jpeg_looks_like_a_plain_resize() -> None:
    image = noise(3).resize((1200, 800), Image.Resampling.BICUBIC)
    data = save(image, "JPEG", exif=exif(6), quality=95)
    prepared = prepare_image(data, dataclasses.replace(CFG, short_side=100))
    assert (prepared.width, prepared.height) == (100, 150)
    upright = image.transpose(Image.Transpose.ROTATE_270).resize(
        (100, 150), Image.Resampling.BICUBIC
    )
    assert np.abs(pixels(prepared.data) - np.asarray(upright).astype(int)).mean() < 3


@pytest.mark.parametrize("target", ["jpeg", "png", "webp"])
def test_encode_rewrites_other_formats_only(target: str) -> None:
    cfg = dataclasses.replace(CFG, encode=target)
    for source in ("jpeg", "png", "webp"):
        data = save(RGB, source)
        prepared = prepare_image(data, cfg)
        assert (Image.open(io.BytesIO(prepared.data)).format or "").lower() == target
        assert (prepared.data == data) == (source == target)


def test_moments_are_those_of_the_pixels() -> None:
    values = np.asarray(RGB).reshape(-1, 3) / 255.0
    expected = [*values.mean(axis=0), *(values**2).mean(axis=0)]
    np.testing.assert_allclose(prepare_image(save(RGB, "PNG"), CFG).moments, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("data", "changes", "reason"),
    [
        (save(RGB, "PNG"), {"max_pixels": 48 * 64 - 1}, "too_many_pixels"),
        (save(RGB, "PNG"), {"max_bytes": 10}, "too_many_bytes"),
        (save(noise(0, 8, 16384), "PNG"), {"encode": "webp"}, "encode_error"),
        (save(RGB, "JPEG")[:-200], {}, "truncated"),
        (b"", {}, "empty"),
        (b"<html>", {}, "not_an_image"),
    ],
)
def test_refusals_have_reasons(data: bytes, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        prepare_image(data, dataclasses.replace(CFG, **changes))  # type: ignore[arg-type]
    assert caught.value.reason == reason
