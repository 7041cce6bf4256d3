"""Random views of images or clips, made on the device: crop, flip, blur, colour and solarise.

A view costs two matrix products and one linear map of the colours. Everything random follows from
the sample's key and the number of the view, so a sample has the same views in any batch and
process, and in a resumed run.

Shape legend: B images or clips, C = 3 channels, T frames (1 for images), H and W pixels of the
picture, S pixels on a side of the view, V views, N tokens in a view, K tokens kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.image_size import ImageSize, as_image_size, height_width
from models.keyed_random.streams import SampleStream
from models.keyed_random.tensors import bits, uniforms

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue by ITU-R BT.601

# RGB to YIQ. Rotating (I, Q) changes the hue and keeps the brightness.
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))

# The uniform numbers drawn for a view, in this order.
_DRAWS = (
    *("area", "ratio", "left", "top", "flip", "blur", "sigma", "colour", "brightness"),
    *("contrast", "saturation", "hue", "grey", "solarise"),
)
Draws = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How views are drawn. The fields are those of `pipelines.config.views.ViewsConfig`."""

    flip: float
    ratio: tuple[float, float]
    colour: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: float
    blur: float
    blur_sigma: tuple[float, float]
    solarise: float


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which views are made of a sample; there are V = `globals + locals` of them."""

    globals: int
    locals: int
    global_size: ImageSize
    local_size: ImageSize
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    augmentation: Augmentation
    token_drop: float = 0.0
    time_window: float = 1.0

    @classmethod
    def of(cls, settings: Mapping[str, Any], image_size: ImageSize | list[int]) -> Views:
        """Makes it from the fields of `ViewsConfig`; `local_size` None means the global size."""
        own = ("globals", "locals", "global_scale", "local_scale", "token_drop", "time_window")
        rest = {k: v for k, v in settings.items() if k in Augmentation.__dataclass_fields__}
        rest = {k: tuple(v) if isinstance(v, list) else v for k, v in rest.items()}
        return cls(
            **{name: settings[name] for name in own},
            global_size=as_image_size(image_size),
            local_size=as_image_size(settings["local_size"] or image_size),
            augmentation=Augmentation(**rest),
        )

    def kept(self, steps: int, per_step: int) -> tuple[int, int]:
        """Returns how many tokens a view keeps.

        Args:
            steps: time steps of a sample; 1 for images.
            per_step: tokens per time step.

        Returns:
            Length of the view's window in time steps, and number of tokens kept within it; both at
            least 1.
        """
        lasts = max(1, round(self.time_window * steps))
        return lasts, max(1, round(lasts * per_step * (1 - self.token_drop)))

    def make(self, pixels: torch.Tensor, keys_B: torch.Tensor) -> list[torch.Tensor]:
        """Makes all views of a batch, global ones first.

        Args:
            pixels: uint8 images [B, 3, H, W] or clips [B, 3, T, H, W]; all frames of a clip are
                treated alike.
            keys_B: int64 keys of the samples.

        Returns:
            For every view float32 [B, 3, (T,) H', W'] of its size, with values in [0, 1], also
            under autocast.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            return [self._view(pixels, keys_B, v) for v in range(self.globals + self.locals)]

    def scale_of(self, view: int) -> tuple[float, float]:
        """Returns the range of a view's area, as a fraction of the picture."""
        return self.global_scale if view < self.globals else self.local_scale

    def _view(self, pixels: torch.Tensor, keys_B: torch.Tensor, view: int) -> torch.Tensor:
        size = self.global_size if view < self.globals else self.local_size
        draws = view_draws(keys_B, view)
        return make_view(pixels, draws, size, self.scale_of(view), self.augmentation)


def view_draws(keys_B: torch.Tensor, view: int) -> Draws:
    """Draws the uniform numbers of a view, by name."""
    draws = uniforms(keys_B, SampleStream.VIEWS.at(2 * view), len(_DRAWS))
    return dict(zip(_DRAWS, draws.unbind(1), strict=True))


def kept_tokens(
    keys_B: torch.Tensor, view: int, steps: int, per_step: int, lasts: int, keep: int
) -> torch.Tensor:
    """Chooses random tokens of a view, within a random window of its time steps.

    Args:
        keys_B: int64 keys of the samples.
        view: number of the view.
        steps: number of time steps in the view; 1 for images.
        per_step: number of tokens in a time step.
        lasts: length of the window in time steps; `steps` takes all.
        keep: K, the number of tokens kept.

    Returns:
        Token numbers, ascending, int64 [B, K].
    """
    order_BN, inside_BN = token_order(keys_B, view, steps, per_step, lasts)
    order_BN = order_BN.masked_fill(~inside_BN, torch.iinfo(torch.int64).max)
    return order_BN.argsort(1)[:, :keep].sort(1).values


def token_order(
    keys_B: torch.Tensor, view: int, steps: int, per_step: int, lasts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the numbers by which `kept_tokens` orders a view's tokens, and its window.

    Returns:
        Random numbers, int64 [B, N], and which tokens are in the window, bool [B, N].
    """
    count = steps * per_step
    words = bits(keys_B, SampleStream.VIEWS.at(2 * view + 1), count + 1)
    order_BN, start_B1 = words[:, :count], words[:, count:] % (steps - lasts + 1)
    since_BN = torch.arange(count, device=keys_B.device) // per_step - start_B1
    return order_BN, (since_BN >= 0) & (since_BN < lasts)


def make_view(
    pixels: torch.Tensor,
    draws: Draws,
    size: ImageSize,
    scale: tuple[float, float],
    how: Augmentation,
) -> torch.Tensor:
    """Makes one view of every sample, float32 [B, 3, (T,) H', W'] in [0, 1].

    Args:
        pixels: uint8 [B, 3, (T,) H, W].
        draws: uniform numbers in [0, 1) by name, [B] each.
        size: pixels on a side of the view, or its height H' and width W'.
        scale: range of the crop's area, as a fraction of the picture.
        how: all other settings.
    """
    rows_BSH, columns_BSW = _resampling(draws, tuple(pixels.shape[-2:]), size, scale, how)
    extra = (slice(None),) + (None,) * (pixels.ndim - 3)  # for channels and frames
    view = rows_BSH[extra] @ (pixels.float() / 255) @ columns_BSW.mT[extra]
    if how.colour or how.grey:
        view = _recolour(view, draws, how)
    view = view.clamp(0, 1)
    if how.solarise:
        chosen = (draws["solarise"] < how.solarise).view(-1, *[1] * (view.ndim - 1))
        view = torch.where(chosen & (view >= 0.5), 1 - view, view)
    return view


def crop_boxes(
    draws: Draws, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes boxes of random area, aspect ratio (uniform in its logarithm) and place.

    The ratio is relative to the picture's: 1 keeps its aspect. Sides need not be whole pixels. A
    box that is larger than the picture is cut to its size, where
    `torchvision.transforms.RandomResizedCrop` would draw again.

    Returns:
        Left, top, width and height in pixels, [B] each.
    """
    area_B = height * width * _between(draws["area"], scale)
    ratio_B = torch.exp(_between(draws["ratio"], (math.log(ratio[0]), math.log(ratio[1]))))
    ratio_B = ratio_B * (width / height)
    wide_B = (area_B * ratio_B).sqrt().clamp(max=width)
    high_B = (area_B / ratio_B).sqrt().clamp(max=height)
    return draws["left"] * (width - wide_B), draws["top"] * (height - high_B), wide_B, high_B


def _resampling(
    draws: Draws,
    picture: tuple[int, ...],
    size: ImageSize,
    scale: tuple[float, float],
    how: Augmentation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns crop, resize, flip and blur as matrices, [B, H', H] and [B, W', W]."""
    height, width = picture
    left_B, top_B, wide_B, high_B = crop_boxes(draws, height, width, scale, how.ratio)
    high, wide = height_width(size)
    rows_BSH = resize_matrix(top_B, high_B, height, high)
    columns_BSW = resize_matrix(left_B, wide_B, width, wide)
    if how.flip:
        flipped_B = draws["flip"] < how.flip
        columns_BSW = torch.where(flipped_B[:, None, None], columns_BSW.flip(1), columns_BSW)
    if how.blur:
        sigma_B = _between(draws["sigma"], how.blur_sigma) * (draws["blur"] < how.blur)
        rows_BSH = _blur_matrix(sigma_B, high) @ rows_BSH
        columns_BSW = _blur_matrix(sigma_B, wide) @ columns_BSW
    return rows_BSH, columns_BSW


def resize_matrix(
    start_B: torch.Tensor, length_B: torch.Tensor, count: int, size: int
) -> torch.Tensor:
    """Makes the matrix that resamples part of a line linearly, with antialiasing.

    Args:
        start_B: where the part begins, in pixels; pixel edges are at whole numbers.
        length_B: length of the part in pixels.
        count: number of pixels in the line.
        size: S, the number of pixels to make.

    Returns:
        float32 [B, S, count]. Rows sum to 1; each is a triangle as wide as the coarser grid's step.
    """
    device = start_B.device
    step_B = (length_B / size)[:, None]
    centre_BS = start_B[:, None] + step_B * (torch.arange(size, device=device) + 0.5)
    pixel_N = torch.arange(count, device=device) + 0.5
    distance_BSN = (pixel_N - centre_BS[..., None]).abs() / step_B.clamp(min=1)[..., None]
    weight_BSN = (1 - distance_BSN).clamp(min=0)
    return weight_BSN / weight_BSN.sum(-1, keepdim=True)


def _blur_matrix(sigma_B: torch.Tensor, size: int) -> torch.Tensor:
    """Returns a Gaussian blur of S pixels, [B, S, S]. Rows sum to 1; sigma 0 gives the identity."""
    places_S = torch.arange(size, device=sigma_B.device)
    distance_SS = (places_S[:, None] - places_S).float()
    weight_BSS = torch.exp(-0.5 * (distance_SS / sigma_B.clamp(min=0.05)[:, None, None]) ** 2)
    return weight_BSS / weight_BSS.sum(-1, keepdim=True)


def _recolour(view: torch.Tensor, draws: Draws, how: Augmentation) -> torch.Tensor:
    """Applies brightness, contrast, saturation, hue and grey as one linear map and a shift.

    The order is fixed and values are not clipped in between, unlike torchvision's ColorJitter.
    """
    # A factor of 1 changes nothing.
    on_B = (draws["colour"] < how.colour).float()
    bright_B, contrast_B, saturation_B = (
        1 + on_B * strength * (2 * draws[name] - 1)
        for name, strength in (
            ("brightness", how.brightness),
            ("contrast", how.contrast),
            ("saturation", how.saturation),
        )
    )
    saturation_B = torch.where(draws["grey"] < how.grey, 0.0, saturation_B)
    turn_B = on_B * 2 * torch.pi * how.hue * (2 * draws["hue"] - 1)
    grey_C = _constants(view.device)[0]
    luma_CC = grey_C.expand(3, 3)  # gives every channel the grey value
    identity_CC = torch.eye(3, device=view.device)
    saturate_BCC = _mixed(identity_CC, luma_CC, saturation_B)
    colour_BCC = saturate_BCC @ _hue_matrix(turn_B) * bright_B[:, None, None]
    flat = view.flatten(2)  # [B, 3, pixels of all frames]
    mean_B1 = torch.einsum("c,bcp->b", grey_C, flat)[:, None] * bright_B[:, None] / flat.shape[2]
    mapped = (colour_BCC * contrast_B[:, None, None]) @ flat
    # Saturation and hue do not change the mean grey value.
    mapped = mapped + ((1 - contrast_B)[:, None] * mean_B1)[..., None]
    return mapped.view_as(view)


Constants = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _constants(device: torch.device) -> Constants:
    """Returns `GREY`, RGB to YIQ and its inverse, from a cache: a copy may wait for the device.

    Where a mode makes tensors of its own (fake ones, as `pipelines.capacity` counts with), they are
    made anew, because they mean nothing outside of it, nor cached ones inside.
    """
    cached = type(torch.empty(0)) is torch.Tensor
    return _cached_constants(device) if cached else _make_constants(device)


def _make_constants(device: torch.device) -> Constants:
    to_CC = torch.tensor(_TO_YIQ)
    grey_C, to_CC, back_CC = (
        values.to(device, non_blocking=True)
        for values in (torch.tensor(GREY), to_CC, torch.linalg.inv(to_CC))
    )
    return grey_C, to_CC, back_CC


_cached_constants = functools.cache(_make_constants)


def _mixed(one_CC: torch.Tensor, other_CC: torch.Tensor, share_B: torch.Tensor) -> torch.Tensor:
    share = share_B[:, None, None]
    return share * one_CC + (1 - share) * other_CC


def _hue_matrix(turn_B: torch.Tensor) -> torch.Tensor:
    _, to_CC, back_CC = _constants(turn_B.device)
    zero, one, cos, sin = (
        torch.zeros_like(turn_B),
        torch.ones_like(turn_B),
        turn_B.cos(),
        turn_B.sin(),
    )
    turn_BCC = torch.stack(
        [
            torch.stack([one, zero, zero], -1),
            torch.stack([zero, cos, -sin], -1),
            torch.stack([zero, sin, cos], -1),
        ],
        1,
    )
    matrix_BCC: torch.Tensor = back_CC @ turn_BCC @ to_CC
    return matrix_BCC


def _between(draw_B: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * draw_B
