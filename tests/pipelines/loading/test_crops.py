"""Random crops follow scale and ratio, and fit the stored size."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision.io  # noqa: F401  registers torch.ops.image

from helpers.pipelines.loading import row_of, variants
from models.keyed_random.arrays import sample_keys
from models.media.images import decode_image
from pipelines.loading.decoding import DecodeError, decode_rows
from pipelines.loading.masks.crops import random_crops


def test_size_that_contradicts_the_manifest_is_refused() -> None:
    row = {**row_of(variants()[0], "kind-0"), "height": 31, "crop": [0, 0, 8, 8], "flipped": False}
    with pytest.raises(DecodeError, match="stored as 31x40, decodes to 30x40"):
        decode_rows(pa.Table.from_pylist([row]), np.empty((1, 3, 32, 32), np.uint8))


@pytest.mark.parametrize("side", [32, 30])  # eight pixels at a time, and one by one
@pytest.mark.parametrize("kind", [0, 1, 2, 3])  # colour and grey, PNG and JPEG
def test_pixels_are_those_of_a_plain_resize(kind: int, side: int) -> None:
    """However the channels are laid out on the way, bit for bit."""
    data = variants()[kind]
    whole = np.asarray(decode_image(data).convert("RGB")).transpose(2, 0, 1)
    if kind in (1, 3):  # torch's decoder and Pillow's need not be of one version
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        whole = torch.ops.image.decode_jpeg(encoded, 0, False).expand(3, -1, -1).numpy()
    crop = torch.from_numpy(np.ascontiguousarray(whole[None, :, 3:28, 5:36]))
    plain = torch.nn.functional.interpolate(
        crop, size=(side, side), mode="bicubic", antialias=True
    )[0].numpy()
    for flipped, expected in ((False, plain), (True, plain[..., ::-1])):
        row = {**row_of(data, "picture"), "crop": [5, 3, 36, 28], "flipped": flipped}
        found = np.empty((1, 3, side, side), np.uint8)
        decode_rows(pa.Table.from_pylist([row]), found)
        assert (found[0] == expected).all()


def test_crops_lie_inside_and_follow_scale_and_ratio() -> None:
    keys = sample_keys([i.to_bytes(16, "little") for i in range(20_000)], 0, 0)
    sizes = np.tile(np.array([[400, 500]], np.int32), (len(keys), 1))
    left, top, right, bottom = random_crops(keys, sizes, (0.3, 1.0), (3 / 4, 4 / 3)).T
    assert left.min() == top.min() == 0
    assert right.max() == 500
    assert bottom.max() == 400
    width, height = right - left, bottom - top
    area, ratio = width * height / 200_000, width / height
    assert 0.295 < area.min() < 0.31
    assert area.max() > 0.95
    assert ratio.min() == pytest.approx(3 / 4, abs=0.01)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.01)
    # The same distribution as torchvision's, which is the usual one.
    reference = torchvision_areas(2000)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(area, q) == pytest.approx(np.quantile(reference, q), abs=0.03)


def torchvision_areas(count: int) -> np.ndarray:
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, 400, 500)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [
            RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(count)
        ]
    return np.array([h * w for _, _, h, w in drawn]) / 200_000


def test_crop_of_extreme_shapes_is_centred() -> None:
    keys = sample_keys([i.to_bytes(16, "little") for i in range(3)], 0, 0)
    sizes = np.array([[10, 1000], [1000, 10], [1, 1]], np.int32)
    boxes = random_crops(keys, sizes, (1.0, 1.0), (3 / 4, 4 / 3))
    assert boxes.tolist() == [[493, 0, 506, 10], [0, 493, 10, 506], [0, 0, 1, 1]]
