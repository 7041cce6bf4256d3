"""Random crop boxes as a function of the samples' keys; numpy only.

Shape suffixes: B samples, T tries.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.keyed_random.arrays import I64, U64, uniforms
from models.keyed_random.streams import SampleStream

I32 = npt.NDArray[np.int32]

CROP_TRIES = 10


def random_crops(
    keys_B: U64, sizes_B2: I32, scale: tuple[float, float], ratio: tuple[float, float]
) -> I32:
    """Draws one random resized crop for every sample, fixed by its key.

    The rule is that of `torchvision.transforms.RandomResizedCrop`: the area is uniform in `scale`,
    the aspect ratio is log-uniform in `ratio`, and after ten boxes that do not fit, the largest
    centred box of an allowed ratio is taken.

    Args:
        keys_B: `sample_keys`.
        sizes_B2: height and width of the images, pixels.
        scale: area range as a fraction of the image.
        ratio: range of width / height.

    Returns:
        int32 [B, 4] of left, top, right, bottom, in pixels; right and bottom exclusive.
    """
    height_B, width_B = sizes_B2[:, 0].astype(np.int64), sizes_B2[:, 1].astype(np.int64)
    draws_BT2 = uniforms(keys_B, SampleStream.CROP, 2 * CROP_TRIES + 2)
    place_B2, draws_BT2 = draws_BT2[:, :2], draws_BT2[:, 2:].reshape(-1, CROP_TRIES, 2)
    area_BT = (scale[0] + (scale[1] - scale[0]) * draws_BT2[..., 0]) * (height_B * width_B)[:, None]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect_BT = np.exp(low + (high - low) * draws_BT2[..., 1])
    w_BT = np.rint(np.sqrt(area_BT * aspect_BT)).astype(np.int64)
    h_BT = np.rint(np.sqrt(area_BT / aspect_BT)).astype(np.int64)
    fits_BT = (w_BT > 0) & (w_BT <= width_B[:, None]) & (h_BT > 0) & (h_BT <= height_B[:, None])
    rows, first_B, found_B = np.arange(len(keys_B)), fits_BT.argmax(1), fits_BT.any(1)
    centre_w, centre_h = _centred_sizes(width_B, height_B, ratio)
    w_B = np.where(found_B, w_BT[rows, first_B], centre_w)
    h_B = np.where(found_B, h_BT[rows, first_B], centre_h)
    left_B = np.where(found_B, place_B2[:, 0] * (width_B - w_B + 1), (width_B - w_B) // 2)
    top_B = np.where(found_B, place_B2[:, 1] * (height_B - h_B + 1), (height_B - h_B) // 2)
    left_B, top_B = left_B.astype(np.int64), top_B.astype(np.int64)
    return np.stack([left_B, top_B, left_B + w_B, top_B + h_B], 1).astype(np.int32)


def _centred_sizes(width_B: I64, height_B: I64, ratio: tuple[float, float]) -> tuple[I64, I64]:
    """Returns the largest width and height inside the image whose ratio is allowed."""
    w_B = np.minimum(width_B, np.rint(height_B * ratio[1]).astype(np.int64))
    h_B = np.minimum(height_B, np.rint(width_B / ratio[0]).astype(np.int64))
    return np.maximum(w_B, 1), np.maximum(h_B, 1)
