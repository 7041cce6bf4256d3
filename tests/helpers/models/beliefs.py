"""Small objectives with a predictor, and what the tests of beliefs share.

Shape legend: B images or clips, C channels, T frames, H and W pixels, N tokens, P pixel values.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from models.beliefs.expectation import Expectation, Mask
from models.encoders.predictor import Predictor
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.objectives.ijepa import IJEPA
from models.objectives.latent import LatentPrediction
from models.objectives.vjepa import VJEPA

GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
IMAGES = EncoderShape(image_size=32, patch_size=8, width=48, depth=2, heads=3)
CLIPS = EncoderShape(
    image_size=16, patch_size=8, width=24, depth=1, heads=2, frames=4, tubelet=2, init="fan_in"
)


def objective(
    shape: EncoderShape,
    *,
    target_norm: str = "token",
    predict: Literal["tokens", "mean"] = "tokens",
    seed: int = 0,
) -> LatentPrediction:
    """I-JEPA of images or V-JEPA of clips with random weights; both encoders differ."""
    torch.manual_seed(seed)
    encoder = VisionTransformer(shape)
    predictor = Predictor(grid=shape.grid, encoder_width=shape.width, width=24, depth=1, heads=2)
    kind = IJEPA if shape.frames == 1 else VJEPA
    built = kind(
        encoder,
        predictor,
        **GREY,
        loss="l2",
        ema=(0.9, 1.0),
        target_norm=target_norm,
        predict=predict,
    )
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *predictor.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


def mask_of(context: list[int], hidden: list[int]) -> Mask:
    return Mask(context_K=torch.tensor(context), hidden_T=torch.tensor(hidden))


HALVES = [mask_of(list(range(4)), list(range(4, 8))), mask_of(list(range(4, 8)), list(range(4)))]
"""Masks of `CLIPS` that hide one time step behind the other."""


def random_pixels(shape: EncoderShape, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    frames = () if shape.frames == 1 else (shape.frames,)
    size = (count, 3, *frames, int(shape.image_size), int(shape.image_size))  # type: ignore[arg-type]
    return torch.randint(256, size, dtype=torch.uint8, generator=generator)


def patches_of(expectation: Expectation, pixels: Tensor) -> Tensor:
    from models.media.preprocessing import normalize

    return expectation.patches(normalize(pixels, GREY["mean"], GREY["std"]))
