"""Random crop boxes as a function of the samples' keys; numpy only.

Shape suffixes: B samples, T tries.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.keyed_random.arrays import F64, I64, U64, uniforms
from models.keyed_random.streams import SampleStream
from models.media.fit import shown_boxes
from pipelines.config.data import DataConfig
from pipelines.config.train import ModelConfig

I32 = npt.NDArray[np.int32]

CROP_TRIES = 10


def fitted_crops(keys_B: U64, sizes_B2: I32, model: ModelConfig, data: DataConfig) -> I32:
    """Draws a random crop of what the input shows of every picture, under the run's fit.

    Args:
        keys_B: `sample_keys`.
        sizes_B2: height and width of the pictures, pixels.
        model: the size of the input and the fit.
        data: range of the crops' areas and ratios.

    Returns:
        int32 [B, 4] of left, top, right, bottom, in pixels of the picture. With `pad`, a box may
        reach beyond it.
    """
    fit, (height, width) = model.chosen_fit, model.height_width
    ranges = (data.crop_scale, data.crop_ratio)
    if fit == "crop":
        return random_crops(keys_B, sizes_B2, *ranges, width / height)
    if fit != "pad":
        return random_crops(keys_B, sizes_B2, *ranges, sizes_B2[:, 1] / sizes_B2[:, 0])
    plane_B4 = np.rint(shown_boxes(fit, sizes_B2, model.image_size)).astype(np.int32)
    planes_B2 = plane_B4[:, [3, 2]] - plane_B4[:, [1, 0]]
    boxes_B4 = random_crops(keys_B, planes_B2, *ranges, width / height)
    return boxes_B4 + plane_B4[:, [0, 1, 0, 1]]


def random_crops(
    keys_B: U64,
    sizes_B2: I32,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    aspect_B: F64 | float = 1.0,
) -> I32:
    """Draws one random resized crop for every sample, fixed by its key.

    The rule is that of `torchvision.transforms.RandomResizedCrop`: the area is uniform in `scale`,
    the aspect ratio is log-uniform in `ratio`, and after ten boxes that do not fit, the largest
    centred box of an allowed ratio is taken.

    Args:
        keys_B: `sample_keys`.
        sizes_B2: height and width of the images, pixels.
        scale: area range as a fraction of the image.
        ratio: range of width / height, relative to `aspect_B`.
        aspect_B: width / height that a crop of ratio 1 has.

    Returns:
        int32 [B, 4] of left, top, right, bottom, in pixels; right and bottom exclusive.
    """
    height_B, width_B = sizes_B2[:, 0].astype(np.int64), sizes_B2[:, 1].astype(np.int64)
    draws_BT2 = uniforms(keys_B, SampleStream.CROP, 2 * CROP_TRIES + 2)
    place_B2, draws_BT2 = draws_BT2[:, :2], draws_BT2[:, 2:].reshape(-1, CROP_TRIES, 2)
    area_BT = (scale[0] + (scale[1] - scale[0]) * draws_BT2[..., 0]) * (height_B * width_B)[:, None]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    relative_B = np.broadcast_to(np.asarray(aspect_B, np.float64), len(keys_B))
    aspect_BT = np.exp(low + (high - low) * draws_BT2[..., 1]) * relative_B[:, None]
    w_BT = np.rint(np.sqrt(area_BT * aspect_BT)).astype(np.int64)
    h_BT = np.rint(np.sqrt(area_BT / aspect_BT)).astype(np.int64)
    fits_BT = (w_BT > 0) & (w_BT <= width_B[:, None]) & (h_BT > 0) & (h_BT <= height_B[:, None])
    rows, first_B, found_B = np.arange(len(keys_B)), fits_BT.argmax(1), fits_BT.any(1)
    centre_w, centre_h = _centred_sizes(width_B, height_B, ratio, relative_B)
    w_B = np.where(found_B, w_BT[rows, first_B], centre_w)
    h_B = np.where(found_B, h_BT[rows, first_B], centre_h)
    left_B = np.where(found_B, place_B2[:, 0] * (width_B - w_B + 1), (width_B - w_B) // 2)
    top_B = np.where(found_B, place_B2[:, 1] * (height_B - h_B + 1), (height_B - h_B) // 2)
    left_B, top_B = left_B.astype(np.int64), top_B.astype(np.int64)
    return np.stack([left_B, top_B, left_B + w_B, top_B + h_B], 1).astype(np.int32)


def _centred_sizes(
    width_B: I64, height_B: I64, ratio: tuple[float, float], aspect_B: F64
) -> tuple[I64, I64]:
    """Returns the largest width and height inside the image whose ratio is allowed."""
    w_B = np.minimum(width_B, np.rint(height_B * (ratio[1] * aspect_B)).astype(np.int64))
    h_B = np.minimum(height_B, np.rint(width_B / (ratio[0] * aspect_B)).astype(np.int64))
    return np.maximum(w_B, 1), np.maximum(h_B, 1)
