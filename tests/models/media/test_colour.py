"""Conversion of other colour spaces to sRGB, compared with the equations of their profiles."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from helpers.models.picture_files import cmyk_profile, encode, grey_profile, icc, rgb_profile
from models.media.images import decode_image
from models.media.pictures.colour import is_of_other_colours
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.preparing.images import prepare_image
from pipelines.loading.decoding import _decode_whole

CFG = IngestConfig(source="/x", out="/y")
# Columns: XYZ of red, green, blue, adapted to D50 (Bruce Lindbloom's tables).
SRGB = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
ADOBE = np.array(
    [
        [0.6097559, 0.2052401, 0.1492240],
        [0.3111242, 0.6256560, 0.0632197],
        [0.0194811, 0.0608902, 0.7448387],
    ]
)
WIDE = rgb_profile(ADOBE, 563 / 256)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    """The curve of IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_to_srgb(values: np.ndarray) -> np.ndarray:
    return srgb_levels((values / 255.0) ** (563 / 256) @ (np.linalg.inv(SRGB) @ ADOBE).T)


def test_rgb_follows_its_matrix_and_curve() -> None:
    values = np.asarray(PICTURE)
    expected = adobe_to_srgb(values)
    assert np.abs(expected - values).max() > 20  # it matters
    files = {kind: encode(PICTURE, kind, icc_profile=WIDE) for kind in ("PNG", "TIFF")}
    files["WEBP"] = encode(PICTURE, "WEBP", lossless=True, icc_profile=WIDE)
    files["JPEG2000"] = jp2_with_profile(encode(PICTURE, "JPEG2000"), WIDE)
    for kind, data in files.items():
        assert np.abs(np.asarray(decode_image(data)) - expected).max() <= 1.5, kind


def jp2_with_profile(data: bytes, profile: bytes) -> bytes:
    """Replaces the enumerated colour space, which Pillow writes, by a profile."""
    at = data.index(b"colr") - 4
    old = int.from_bytes(data[at : at + 4], "big")
    box = b"colr\2\0\0" + profile
    box = (len(box) + 4).to_bytes(4, "big") + box
    header = data.index(b"jp2h") - 4
    length = int.from_bytes(data[header : header + 4], "big") + len(box) - old
    return (
        data[:header] + length.to_bytes(4, "big") + data[header + 4 : at] + box + data[at + old :]
    )


def test_profile_applies_under_a_palette_and_under_transparency() -> None:
    values = np.asarray(PICTURE)
    alpha = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (16, 8)))
    rgba = PICTURE.copy()
    rgba.putalpha(alpha)
    seen = np.asarray(decode_image(encode(rgba, "PNG", icc_profile=WIDE), background=(9, 8, 7)))
    assert (seen[:, ::2] == (9, 8, 7)).all()  # the background is sRGB already
    assert np.abs(seen[:, 1::2] - adobe_to_srgb(values[:, 1::2])).max() <= 1.5
    palette = PICTURE.quantize(32)
    expected = adobe_to_srgb(np.asarray(palette.convert("RGB")))
    seen = np.asarray(decode_image(encode(palette, "PNG", icc_profile=WIDE)))
    assert np.abs(seen - expected).max() <= 1.5


@pytest.mark.parametrize("gamma", [1.0, 1.8, 3.0])
def test_grey_follows_its_curve(gamma: float) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = srgb_levels((ramp / 255.0) ** gamma)
    profile = grey_profile(gamma)
    for data in (
        encode(Image.fromarray(ramp), "PNG", icc_profile=profile),
        encode(Image.fromarray(ramp.astype(np.uint16) * 257), "TIFF", icc_profile=profile),
    ):
        seen = np.asarray(decode_image(data)).astype(int)
        assert (seen == seen[..., :1]).all()
        # Where the curve is steep, lcms's 16-bit tables are half a level off.
        assert np.abs(seen[..., 0] - expected)[ramp > 8].max() <= 1.5


def test_cmyk_follows_its_table() -> None:
    """Single inks and overprints are nodes of the table, so nothing is interpolated."""
    levels = np.array(list(np.ndindex(2, 2, 2, 2)))  # C, M, Y, K; K the fastest
    lab = np.stack(
        [100 - levels @ [20, 20, 10, 50], levels @ [-40, 60, 0, 0], levels @ [-30, 0, 80, 0]], 1
    )
    lab = np.where(levels[:, 3:] == 1, [0, 0, 0], lab)
    picture = Image.frombytes("CMYK", (16, 1), (levels * 255).astype(np.uint8).tobytes())
    data = encode(picture, "TIFF", icc_profile=cmyk_profile(lab))
    seen = np.asarray(decode_image(data))[0]
    assert (seen[0] == 255).all()
    assert (seen[levels[:, 3] == 1] == 0).all()
    fy = (lab[:, 0] + 16) / 116
    f = np.stack([fy + lab[:, 1] / 500, fy, fy - lab[:, 2] / 200], 1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    expected = srgb_levels(xyz @ np.linalg.inv(SRGB).T)
    assert np.abs(seen - expected)[levels[:, 3] == 0].max() <= 3
    plain = np.asarray(decode_image(encode(picture, "TIFF")))[0]
    np.testing.assert_array_equal(plain, np.asarray(picture.convert("RGB"))[0])


def test_profiles_that_mean_srgb_change_no_bit_and_keep_the_file() -> None:
    lcms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encode(PICTURE, kind, icc_profile=lcms)
        raw = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(decode_image(data)), raw)
        assert prepare_image(data, CFG).data == data
        assert not is_of_other_colours(data)


@pytest.mark.parametrize(
    "profile",
    [
        b"nonsense",
        WIDE[:200],
        WIDE[:128] + b"\xff" * (len(WIDE) - 128),
        icc(b"RGB ", {}),
        grey_profile(3.0),
        cmyk_profile(np.zeros((16, 3))),
    ],
    ids=["nonsense", "cut", "damaged", "empty", "of grey", "of CMYK"],
)
def test_profiles_that_do_not_fit_the_picture_are_ignored(profile: bytes) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        with_it, without = (encode(PICTURE, kind, **o) for o in ({"icc_profile": profile}, {}))
        seen, expected = (np.asarray(decode_image(data)) for data in (with_it, without))
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_other_colours_are_stored_as_srgb_without_a_profile(kind: str) -> None:
    smooth = PICTURE.resize((64, 64), box=(4, 4, 7, 7))
    data = encode(smooth, kind, icc_profile=WIDE)
    prepared = prepare_image(data, CFG)
    stored = Image.open(io.BytesIO(prepared.data))
    assert stored.format == kind
    assert "icc_profile" not in stored.info
    again = np.asarray(stored.convert("RGB")).astype(int)
    assert np.abs(again - np.asarray(decode_image(data))).mean() <= (0 if kind == "PNG" else 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_older_shards_of_other_colours_load_as_they_are_decoded(kind: str) -> None:
    large = WIDE + b"\0" * 150_000  # three segments of a JPEG
    for profile in (WIDE, large):
        data = encode(PICTURE, kind, icc_profile=profile)
        assert is_of_other_colours(data)
        loaded = _decode_whole(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        expected = np.asarray(decode_image(data))
        np.testing.assert_array_equal(loaded.permute(1, 2, 0).numpy(), expected)


def test_a_profile_too_long_for_pillow_still_counts() -> None:
    noise = np.random.default_rng(1).bytes(1_200_000)
    data = encode(PICTURE, "PNG", icc_profile=WIDE + noise)
    expected = adobe_to_srgb(np.asarray(PICTURE))
    assert np.abs(np.asarray(decode_image(data)) - expected).max() <= 1.5
