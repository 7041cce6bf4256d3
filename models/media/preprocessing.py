"""The deterministic transform that evaluation, embedding and serving share.

Torch is imported in the one function that needs it. Processes that only decode, and the HTTP
ingress, start in a third of the time without it.

Shape legend: B images, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.image_size import ImageSize, height_width
from models.media.images import BLACK, Rgb, decode_image
from models.media.pictures.deep import FULL, DeepRange

if TYPE_CHECKING:
    from torch import Tensor

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Settings of the transform from a decoded image to the encoder's input."""

    image_size: ImageSize
    """Pixels on a side of a square input, or (height, width)."""
    mean: tuple[float, float, float]
    """Channel means of values in [0, 1]."""
    std: tuple[float, float, float]
    """Channel standard deviations of values in [0, 1]."""
    interpolation: str = "bicubic"
    """Resampling method, a key of `RESAMPLING`."""
    crop_fraction: float = 1.0
    """Side of the centre crop over the resized short side (timm's crop_pct)."""
    background: Rgb = BLACK
    """Colour that shows through transparent places of an encoded image."""
    deep_range: DeepRange = FULL
    """Value of white in 16-bit images that do not give it (`models.media.images.decode_image`)."""

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation must be one of {sorted(RESAMPLING)}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}")


def mean_colour(mean: tuple[float, float, float]) -> Rgb:
    """Returns the 8-bit colour that is nearest to the channel means, of values in [0, 1].

    Normalised, it is almost zero. It fills what lies outside a padded picture.
    """
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def load_image(
    data: bytes, prep: Preprocessing, *, max_pixels: int | None
) -> npt.NDArray[np.uint8]:
    """Decodes an image and applies the evaluation transform, giving uint8 [H, W, 3].

    Raises:
        ImageError: the image cannot be used (see `models.media.images.decode_image`).
    """
    image = decode_image(
        data, max_pixels=max_pixels, background=prep.background, deep_range=prep.deep_range
    )
    return eval_transform(image, prep)


def eval_transform(image: Image.Image, prep: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resizes the short side and crops the centre, in one pass of resampling.

    Args:
        image: an RGB image of any size.
        prep: settings of the transform.

    Returns:
        uint8 [H, W, 3] of `prep.image_size`.
    """
    height, width = height_width(prep.image_size)
    aspect = width / height
    high = min(image.height, image.width / aspect) * prep.crop_fraction
    wide = high * aspect
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    size, box = (width, height), (left, top, left + wide, top + high)
    if image.size != size or prep.crop_fraction != 1:
        image = image.resize(size, RESAMPLING[prep.interpolation], box=box)
    return np.asarray(image, dtype=np.uint8)


def normalize(
    pixels_BCHW: Tensor, mean: tuple[float, ...] | Tensor, std: tuple[float, ...] | Tensor
) -> Tensor:
    """Converts uint8 pixels to float32 and normalizes the channels, on the input's device.

    Statistics that are already tensors on that device are not copied.

    Args:
        pixels_BCHW: images [B, C, H, W] or clips [B, C, T, H, W].
        mean: channel means of values in [0, 1].
        std: channel standard deviations of values in [0, 1].
    """
    import torch

    mean_C = torch.as_tensor(mean, dtype=torch.float32, device=pixels_BCHW.device)
    std_C = torch.as_tensor(std, dtype=torch.float32, device=pixels_BCHW.device)
    scale_C, shift_C = 1.0 / (255.0 * std_C), mean_C / std_C
    channels = (-1,) + (1,) * (pixels_BCHW.ndim - 2)
    return pixels_BCHW.float() * scale_C.view(channels) - shift_C.view(channels)
