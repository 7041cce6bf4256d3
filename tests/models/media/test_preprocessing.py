"""The evaluation transform, compared with resampling written out from its definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from models.media.preprocessing import Preprocessing, eval_transform


def triangle(x: np.ndarray) -> np.ndarray:
    return (1 - np.abs(x)).clip(0)


def cubic(x: np.ndarray) -> np.ndarray:
    """The cubic kernel of Keys (1981) with a = -1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bilinear": triangle, "bicubic": cubic}


def weights(size: int, start: float, stop: float, out: int, kernel: Callable) -> np.ndarray:  # type: ignore[type-arg]
    """Weights [out, size] of every pixel in every pixel of [start, stop) resampled to `out`."""
    scale = (stop - start) / out
    centres = start + (np.arange(out) + 0.5) * scale
    values = kernel((np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1))
    return values / values.sum(axis=1, keepdims=True)


def expected(pixels: np.ndarray, side: int, crop: float, kernel: Callable) -> np.ndarray:  # type: ignore[type-arg]
    height, width = pixels.shape[:2]
    short = min(height, width) * crop
    rows, columns = (
        weights(size, (size - short) / 2, (size + short) / 2, side, kernel)
        for size in (height, width)
    )
    across = np.einsum("ow,hwc->hoc", columns, pixels.astype(float)).round().clip(0, 255)
    return np.einsum("ph,hoc->poc", rows, across).round().clip(0, 255)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.8])
@pytest.mark.parametrize("size", [(33, 50), (50, 33), (64, 41), (24, 25), (7, 12)])
def test_pixels_are_the_kernel_s_weighted_means(
    size: tuple[int, int], crop: float, kind: str
) -> None:
    """Odd margins make the crop begin between pixels. With medium levels no pass clips overshoots,
    so the order of the two passes does not matter."""
    pixels = np.random.default_rng(0).integers(64, 192, (*size, 3), np.uint8)
    prep = Preprocessing(
        image_size=24, mean=(0,) * 3, std=(1,) * 3, interpolation=kind, crop_fraction=crop
    )
    seen = eval_transform(Image.fromarray(pixels), prep)
    assert np.abs(seen - expected(pixels, 24, crop, KERNELS[kind])).max() <= 1


def test_the_default_is_bicubic() -> None:
    pixels = np.random.default_rng(1).integers(64, 192, (51, 70, 3), np.uint8)
    prep = Preprocessing(image_size=24, mean=(0,) * 3, std=(1,) * 3)
    seen = eval_transform(Image.fromarray(pixels), prep)
    assert np.abs(seen - expected(pixels, 24, 1.0, cubic)).max() <= 1
    assert np.abs(seen - expected(pixels, 24, 1.0, triangle)).max() > 5


def test_nearest_takes_the_pixel_at_the_centre() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (48, 72, 3), np.uint8)
    prep = Preprocessing(image_size=24, mean=(0,) * 3, std=(1,) * 3, interpolation="nearest")
    np.testing.assert_array_equal(
        eval_transform(Image.fromarray(pixels), prep), pixels[1::2, 13:60:2]
    )
