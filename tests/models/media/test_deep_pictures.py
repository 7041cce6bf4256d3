"""Pictures of more than 8 bits: where their range comes from, and the note when it is unknown."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from helpers.models.picture_files import encode, png, tiff
from models.media.images import decode_image
from models.media.pictures.errors import ImageError
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.preparing.images import DIM, prepare_image

CFG = IngestConfig(source="/x", out="/y")
RAMP = np.arange(256).reshape(16, 16)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)


def grey16(values: np.ndarray, kind: str = "PNG") -> bytes:
    return encode(Image.fromarray(values.astype(np.uint16)), kind)


def rgb_tiff(values: np.ndarray) -> bytes:
    tags = {258: (3, [16, 16, 16]), 262: (3, [2]), 277: (3, [3])}
    return tiff(values.astype("<u2"), tags)  # type: ignore[arg-type]


def of_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Scales 0 to 255 to the range of so many bits."""
    return (values / 255 * (2**bits - 1)).round().astype(int)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_fewer_bits_has_its_own_white(bits: int, kind: str) -> None:
    data = grey16(of_bits(RAMP, bits), kind)
    for deep_range in (2**bits - 1, "auto"):
        seen = np.asarray(decode_image(data, deep_range=deep_range))  # type: ignore[arg-type]
        np.testing.assert_array_equal(seen, np.stack([RAMP] * 3, -1))


@pytest.mark.parametrize("bits", [12, 14, 16])
def test_colour_of_fewer_bits_has_its_own_white(bits: int) -> None:
    values = of_bits(COLOUR, bits)
    for data in (png(values, 16, 2), rgb_tiff(values)):
        for deep_range in (2**bits - 1, "auto"):
            seen = np.asarray(decode_image(data, deep_range=deep_range))  # type: ignore[arg-type]
            # White of 16 bits is Pillow's reading, the high byte.
            assert np.abs(seen.astype(int) - COLOUR).max() <= (1 if bits == 16 else 0)


def test_the_range_does_not_apply_to_the_alpha_channel() -> None:
    opaque = np.full((16, 16, 1), 65535)
    opaque[0] = 0
    rgba = np.concatenate([of_bits(COLOUR, 12), opaque], axis=-1)
    grey = np.concatenate([of_bits(RAMP, 12)[..., None], opaque], axis=-1)
    for data, expected in ((png(rgba, 16, 6), COLOUR), (png(grey, 16, 4), RAMP[..., None])):
        seen = np.asarray(decode_image(data, deep_range=4095))
        np.testing.assert_array_equal(seen[1:], np.broadcast_to(expected, seen.shape)[1:])
        assert (seen[0] == 0).all()


def test_the_range_in_a_file_overrides_the_flag() -> None:
    top = 4095
    pgm = b"P5 16 16 4095 " + of_bits(RAMP, 12).astype(">u2").tobytes()
    packed = "".join(format(v, "012b") for v in of_bits(RAMP, 12).ravel())
    strip = int(packed, 2).to_bytes(len(packed) // 8, "big")
    tags: dict[int, tuple[int, list[int]]] = {258: (3, [12]), 262: (3, [1]), 277: (3, [1])}
    for data in (pgm, tiff(RAMP, tags, strip)):
        for deep_range in (65535, top, 1000):
            seen = np.asarray(decode_image(data, deep_range=deep_range))[..., 0].astype(int)
            assert np.abs(seen - RAMP).max() <= 1
        assert not prepare_image(data, CFG).notes


def test_white_may_be_zero() -> None:
    tags: dict[int, tuple[int, list[int]]] = {258: (3, [16]), 262: (3, [0]), 277: (3, [1])}
    seen = np.asarray(decode_image(tiff((RAMP * 257).astype("<u2"), tags)))[..., 0]
    np.testing.assert_array_equal(seen, 255 - RAMP)


def test_values_beyond_the_range_are_refused() -> None:
    with pytest.raises(
        ImageError, match="unknown_range: values from 0 to 65535, not within 0 to 4095"
    ):
        decode_image(grey16(of_bits(RAMP, 16)), deep_range=4095)


@pytest.mark.parametrize("deep_range", [65535, 4095])
def test_pictures_under_an_eighth_of_their_range_are_noted(deep_range: int) -> None:
    cfg = dataclasses.replace(CFG, deep_range=deep_range)
    eighth = (deep_range + 1) // 8
    notes = []
    for most in (eighth - 1, eighth, 0):
        values = (RAMP / 255 * most).astype(int)
        notes.append(prepare_image(grey16(values), cfg).notes)
        assert prepare_image(png(np.stack([values] * 3, -1), 16, 2), cfg).notes == notes[-1]
    assert notes == [(DIM,), (), ()]  # black is black in any range
    assert not prepare_image(encode(Image.fromarray(RAMP.astype(np.uint8) // 9), "PNG"), cfg).notes
    auto = dataclasses.replace(CFG, deep_range="auto")
    assert not prepare_image(grey16(of_bits(RAMP, 12)), auto).notes


@pytest.mark.parametrize("value", [0, -1, 65536])
def test_ranges_that_16_bits_do_not_hold_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="--deep-range"):
        dataclasses.replace(CFG, deep_range=value)
