"""Draws a frame from the latent that a world model has of it.

Shape legend: B frames, C = 3 channels, H and W pixels, D latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS, SHRUNK = 32, 4


class LatentDecoder(nn.Module):
    """A linear layer to a small picture, and convolutions that enlarge it.

    Args:
        latent_width: D.
        size: H and W.
    """

    def __init__(self, latent_width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size, self.small = size, tuple(-(-side // SHRUNK) for side in size)
        self.grow = nn.Linear(latent_width, CHANNELS * self.small[0] * self.small[1])
        larger = [
            layer
            for _ in range(2)
            for layer in (
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                nn.ReLU(),
            )
        ]
        self.enlarge = nn.Sequential(*larger, nn.Conv2d(CHANNELS, 3, 3, padding=1))

    def forward(self, latents_BD: Tensor) -> Tensor:
        """Returns pixel values from -1 to 1, [B, C, H, W]."""
        small_BCHW = self.grow(latents_BD).reshape(-1, CHANNELS, *self.small).relu()
        height, width = self.size
        drawn: Tensor = self.enlarge(small_BCHW)[..., :height, :width]
        return drawn


def latent_loss(
    decoder: LatentDecoder, latents_BD: Tensor, values_BCHW: Tensor, mean_CHW: Tensor
) -> Tensor:
    """Returns the squared error, where more counts what differs more from the mean frame.

    What moves in a world may be a few pixels; by the plain mean, leaving them out costs nothing.
    """
    unusual_BCHW = (values_BCHW - mean_CHW).abs()
    weight_BCHW = 1 + unusual_BCHW / unusual_BCHW.mean().clamp(min=1e-6)
    return torch.mean(
        weight_BCHW * functional.mse_loss(decoder(latents_BD), values_BCHW, reduction="none")
    )
