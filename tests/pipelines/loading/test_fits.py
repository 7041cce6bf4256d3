"""Pixels and tokens of crops under every fit, against what each fit says of the picture's plane.

Shape suffixes: H and W pixels, P patches.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from models.encoders.vit import PatchEmbed
from models.image_size import ImageSize
from models.keyed_random.arrays import sample_keys
from models.media.fit import Fit
from models.media.preprocessing import mean_colour
from pipelines.config.data import DataConfig
from pipelines.config.train import ModelConfig
from pipelines.loading.decoding import decode_into, decode_rows
from pipelines.loading.loader import _layout, _regions
from pipelines.loading.masks.crops import fitted_crops
from pipelines.loading.masks.layouts import make_layout

KEYS = sample_keys([i.to_bytes(16, "little") for i in range(300)], 0, 0)
NO_CROP = DataConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
OUTSIDE = (10, 200, 30)


def model(fit: Fit, size: ImageSize = (32, 64), **fields: Any) -> ModelConfig:
    return ModelConfig(encoder="vit_micro32", image_size=size, patch_size=8, fit=fit, **fields)


def gradient(height: int, width: int) -> np.ndarray:
    """A picture whose red is its column and whose green is its row, from 0 to 255."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, width).round()
    picture[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return picture


def row_of(picture: np.ndarray, box: list[int], flipped: bool = False, **more: Any) -> pa.Table:
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    height, width = picture.shape[:2]
    row = {"image": sink.getvalue(), "height": height, "width": width, "crop": box}
    row |= {"flipped": flipped, "sample_id": b"0" * 16, "source_uri": "x"}
    return pa.Table.from_pylist([row | more])


def decoded(table: pa.Table, *shape: int) -> np.ndarray:
    out = np.full((1, 3, *shape), 77, np.uint8)
    decode_rows(table, out, outside=OUTSIDE)
    return out[0].transpose(1, 2, 0)


def whole_box(fit: Fit, height: int, width: int, size: ImageSize = (32, 64)) -> list[int]:
    sizes = np.array([[height, width]], np.int32)
    return fitted_crops(KEYS[:1], sizes, model(fit, size), NO_CROP)[0].tolist()


@pytest.mark.parametrize(
    ("fit", "height", "width", "box"),
    [
        ("crop", 90, 160, [0, 5, 160, 85]),
        ("crop", 90, 400, [110, 0, 290, 90]),
        ("squash", 90, 400, [0, 0, 400, 90]),
        ("whole", 90, 400, [0, 0, 400, 90]),
        ("pad", 90, 400, [0, -55, 400, 145]),
        ("pad", 100, 100, [-50, 0, 150, 100]),
    ],
)
def test_the_whole_crop_shows_what_the_fit_says(
    fit: Fit, height: int, width: int, box: list[int]
) -> None:
    assert whole_box(fit, height, width) == box


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "whole"])
def test_square_pictures_of_square_models_are_cropped_alike(fit: Fit) -> None:
    sizes, data = np.full((300, 2), 97, np.int32), DataConfig()
    crops = fitted_crops(KEYS, sizes, model(fit, 32), data)
    np.testing.assert_array_equal(crops, fitted_crops(KEYS, sizes, model("crop", 32), data))


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_crops_keep_the_aspect_of_what_is_shown(fit: Fit) -> None:
    """The ratio is relative: by default three quarters to four thirds of the input's aspect."""
    sizes = np.tile(np.array([[90, 400]], np.int32), (300, 1))
    data = DataConfig(crop_scale=(0.3, 0.6))
    left, top, right, bottom = fitted_crops(KEYS, sizes, model(fit), data).T
    ratio = (right - left) / (bottom - top) / (2.0 if fit != "squash" else 400 / 90)
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4
    if fit == "pad":
        assert top.min() < -20
        assert bottom.max() > 110
    else:
        assert min(left.min(), top.min()) >= 0


def test_a_rectangle_shows_its_box() -> None:
    pixels = decoded(row_of(gradient(64, 128), [0, 0, 128, 64]), 32, 64)
    np.testing.assert_allclose(pixels[16, :, 0], np.linspace(2, 253, 64), atol=4)
    np.testing.assert_allclose(pixels[:, 30, 1], np.linspace(4, 251, 32), atol=6)
    flipped = decoded(row_of(gradient(64, 128), [0, 0, 128, 64], flipped=True), 32, 64)
    np.testing.assert_array_equal(flipped, pixels[:, ::-1])


@pytest.mark.parametrize("flipped", [False, True])
def test_what_lies_outside_is_of_one_colour(flipped: bool) -> None:
    """A square picture in the middle of an input twice as wide as high."""
    picture = gradient(64, 64)
    picture[..., 2] = 128
    pixels = decoded(row_of(picture, [-32, 0, 96, 64], flipped=flipped), 32, 64)
    assert (pixels[:, :16] == OUTSIDE).all()
    assert (pixels[:, 48:] == OUTSIDE).all()
    middle = pixels[:, 16:48]
    assert (abs(middle[..., 2].astype(int) - 128) <= 1).all()
    ascending = middle[0, ::-1, 0] if flipped else middle[0, :, 0]
    assert (np.diff(ascending.astype(int)) >= 0).all()
    # A box of which only the left half shows the picture.
    half = decoded(row_of(picture, [32, 0, 96, 64], flipped=flipped), 32, 32)
    outside = (half == OUTSIDE).all(axis=(0, 2))
    assert outside.tolist() == ([True] * 16 + [False] * 16)[:: 1 if flipped else -1]


def test_a_picture_of_its_own_grid_is_a_strip_of_its_patches() -> None:
    picture = gradient(48, 24)  # 6 x 3 patches, in a strip of 32
    table = row_of(picture, [0, 0, 24, 48], grid=[6, 3])
    strip = torch.from_numpy(decoded(table, 8, 8 * 32)).permute(2, 0, 1)[None].float()
    embed = PatchEmbed(8, 4)
    patches = embed.patchify(strip)
    expected = embed.patchify(torch.from_numpy(picture).permute(2, 0, 1)[None].float())
    assert torch.equal(patches[:, :18], expected)
    assert (patches[:, 18:] == 0).all()


def test_grids_of_their_own_and_tokens_that_are_kept() -> None:
    sizes = np.array([[90, 160], [160, 90], [100, 100]], np.int32)
    settings = model("whole", exclude=((0.0, 0.0, 1.0, 0.2),))
    boxes = fitted_crops(KEYS[:3], sizes, settings, NO_CROP)
    layout = make_layout(settings, sizes, boxes, np.zeros(3, np.bool_))
    assert layout is not None
    assert layout.grids_B2.tolist() == [[4, 7], [7, 4], [5, 5]]  # at most 32 tokens
    kept = layout.kept_ids(tubes=2)
    # The upper fifth covers one of four rows in part, two of seven, and just one of five. Every
    # time step takes 32 numbers, as many as a strip has patches.
    assert kept[0].tolist() == [*range(7, 28), *range(32 + 7, 32 + 28)]
    assert kept[1].tolist() == [*range(8, 28), *range(32 + 8, 32 + 28)]
    assert kept[2].tolist() == [*range(5, 25), *range(32 + 5, 32 + 25)]
    table = pa.table({"grid": layout.grids_B2.tolist(), "kept_ids": [k.tolist() for k in kept]})
    batch = _layout(table)
    assert batch["grids"].tolist() == layout.grids_B2.tolist()
    assert batch["kept_valid"].sum(1).tolist() == [42, 40, 40]
    for b in range(3):
        assert batch["kept_ids"][b][batch["kept_valid"][b]].tolist() == kept[b].tolist()


def test_regions_left_out_of_one_grid_change_no_pixel() -> None:
    settings = model("squash", exclude=((0.0, 0.0, 1.0, 0.2),))
    height, width = settings.height_width
    picture, pixels = gradient(72, 128), np.empty((1, 3, height, width), np.uint8)
    rows, columns = settings.grid[:2]
    decode_into(settings, row_of(picture, [0, 0, 128, 72], grid=[rows, columns]), pixels)
    plain = decoded(row_of(picture, [0, 0, 128, 72]), height, width)
    assert (pixels[0].transpose(1, 2, 0) == plain).all()


def test_a_run_without_regions_on_one_grid_has_no_layout() -> None:
    sizes = np.array([[90, 160]], np.int32)
    for fit in ("crop", "pad", "squash"):
        boxes = fitted_crops(KEYS[:1], sizes, model(fit), NO_CROP)
        assert make_layout(model(fit), sizes, boxes, np.zeros(1, np.bool_)) is None


def test_regions_move_with_the_crop_and_its_mirror_image() -> None:
    table = pa.table({"width": [200, 200], "height": [100, 100]})
    crops = np.array([[50, 0, 150, 50]] * 2, np.float32)
    batch = {"crop_boxes": crops, "flipped": np.array([False, True])}
    regions = _regions(((0.25, 0.0, 0.5, 0.25), (0.9, 0.9, 1.0, 1.0)), table, batch)
    torch.testing.assert_close(
        regions[:, 0], torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5]])
    )
    assert (regions[:, 1, 1] > 1).all()  # below what the crop shows


def test_the_colour_outside_is_zero_once_normalised() -> None:
    assert mean_colour((0.5, 0.0, 1.0)) == (128, 0, 255)
