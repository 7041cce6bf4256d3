"""The deterministic transform that evaluation, embedding and serving share.

`prepare` turns a decoded picture into what an encoder takes: pixels, and which patches are kept
where these are not all of the encoder's grid.

Torch is imported in the one function that needs it. Processes that only decode, and the HTTP
ingress, start in a third of the time without it.

Shape legend: B images, C channels, H height, W width, T frames.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.image_size import ImageSize, as_image_size, height_width
from models.media.fit import Fit, grids_of, inner_part, shown_boxes
from models.media.images import BLACK, Rgb, decode_image
from models.media.pictures.deep import FULL, DeepRange
from models.media.regions import Bools, Region, check_region, kept_patches

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
    """Share that is shown of the height and width that `fit` would show, about the centre (timm's
    crop_pct)."""
    fit: Fit = "crop"
    """How a picture is fitted to the input."""
    exclude: tuple[Region, ...] = ()
    """Regions of the picture whose tokens are left out."""
    patch_size: int | None = None
    """Pixels on a side of the encoder's patches, which must be known with the fit `whole` and with
    regions. Artifacts store it with the encoder alone."""
    background: Rgb = BLACK
    """Colour that shows through transparent places of an encoded image."""
    deep_range: DeepRange = FULL
    """Value of white in 16-bit images that do not give it (`models.media.images.decode_image`)."""

    def __post_init__(self) -> None:
        # JSON has lists instead of tuples, in artifacts and in what decoder processes are sent.
        object.__setattr__(self, "image_size", as_image_size(self.image_size))
        for name in ("mean", "std", "background"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        regions = tuple(check_region((r[0], r[1], r[2], r[3])) for r in self.exclude)
        object.__setattr__(self, "exclude", regions)
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation must be one of {sorted(RESAMPLING)}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}")
        if self.fit == "whole" and self.crop_fraction != 1:
            raise ValueError(f"fit whole needs a crop_fraction of 1, got {self.crop_fraction}")

    @property
    def partial(self) -> bool:
        """Whether pictures may have fewer tokens than the encoder's grid, or grids of their own."""
        return self.fit == "whole" or bool(self.exclude)


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """One picture or clip as an encoder takes it."""

    pixels: npt.NDArray[np.uint8]
    """[H, W, 3], or [T, H, W, 3] of a clip."""
    kept: Bools | None = None
    """Which patches are encoded, by rows and columns of the pixels' own grid; None for all patches
    of the encoder's grid. The same in all frames."""


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
    return load_input(data, prep, max_pixels=max_pixels).pixels


def load_input(data: bytes, prep: Preprocessing, *, max_pixels: int | None) -> EncoderInput:
    """Decodes an image and prepares it for the encoder.

    Raises:
        ImageError: the image cannot be used (see `models.media.images.decode_image`).
        ValueError: the regions leave nothing of it.
    """
    image = decode_image(
        data, max_pixels=max_pixels, background=prep.background, deep_range=prep.deep_range
    )
    return prepare(image, prep)


def prepare(image: Image.Image, prep: Preprocessing) -> EncoderInput:
    """Applies the evaluation transform, and finds which patches are kept.

    Raises:
        ValueError: the regions leave nothing of it.
    """
    kept = input_layout(image.height, image.width, prep).kept
    return EncoderInput(eval_transform(image, prep), kept)


class InputLayout(NamedTuple):
    """How pictures of one size are fitted to the input."""

    box: tuple[float, float, float, float]
    """What is shown: left, top, right and bottom, in pixels of the picture."""
    size: tuple[int, int]
    """Height and width of the input, pixels."""
    kept: Bools | None
    """As for `EncoderInput`."""


@functools.lru_cache(maxsize=1024)
def input_layout(height: int, width: int, prep: Preprocessing) -> InputLayout:
    """Finds how pictures of one size are fitted to the input.

    Args:
        height: height of the picture, pixels.
        width: width of the picture, pixels.
        prep: settings of the transform.

    Raises:
        ValueError: the regions leave nothing of it, or `patch_size` is needed and not known.
    """
    picture = [(height, width)]
    boxes = shown_boxes(prep.fit, picture, prep.image_size, prep.crop_fraction)
    left, top, right, bottom = boxes[0].tolist()
    box, size = (left, top, right, bottom), height_width(prep.image_size)
    if not prep.partial:
        return InputLayout(box, size, None)
    if prep.patch_size is None:
        raise ValueError("the fit whole and regions left out need the size of a patch")
    grids = grids_of(prep.fit, boxes, prep.image_size, prep.patch_size)
    rows, columns = grids[0].tolist()
    kept = kept_patches(prep.exclude, picture, boxes, grids, rows * columns)
    if not kept.any():
        raise ValueError(f"the regions left out leave nothing of a picture of {width}x{height}")
    made = (rows * prep.patch_size, columns * prep.patch_size)
    everything = made == size and bool(kept.all())
    return InputLayout(box, made, None if everything else kept.reshape(rows, columns))


def eval_transform(image: Image.Image, prep: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resizes what the fit shows of a picture, in one pass of resampling.

    Args:
        image: an RGB image of any size.
        prep: settings of the transform.

    Returns:
        uint8 [H, W, 3] of `prep.image_size`; with the fit `whole`, of the picture's own grid.
    """
    box, (height, width), _ = input_layout(image.height, image.width, prep)
    if image.size == (width, height) and prep.crop_fraction == 1:
        return np.asarray(image, dtype=np.uint8)
    part, rows, columns = inner_part(box, (image.height, image.width), (height, width))
    size = (columns.stop - columns.start, rows.stop - rows.start)
    resized = np.asarray(image.resize(size, RESAMPLING[prep.interpolation], box=part), np.uint8)
    if size == (width, height):
        return resized
    padded = np.full((height, width, 3), mean_colour(prep.mean), np.uint8)
    padded[rows, columns] = resized
    return padded


def normalize(
    pixels_BCHW: Tensor, mean: tuple[float, ...] | Tensor, std: tuple[float, ...] | Tensor
) -> Tensor:
    """Converts uint8 pixels to float32 and normalizes the channels, on the input's device.

    Args:
        pixels_BCHW: images [B, C, H, W] or clips [B, C, T, H, W].
        mean: channel means of values in [0, 1]; a tensor must be on that device.
        std: channel standard deviations of values in [0, 1], in the same way.
    """
    import torch

    mean_C, std_C = (
        values.float()
        if isinstance(values, torch.Tensor)
        else torch.tensor(values).to(pixels_BCHW.device, torch.float32, non_blocking=True)
        for values in (mean, std)
    )
    scale_C, shift_C = 1.0 / (255.0 * std_C), mean_C / std_C
    channels = (-1,) + (1,) * (pixels_BCHW.ndim - 2)
    return pixels_BCHW.float() * scale_C.view(channels) - shift_C.view(channels)
