"""Decoders from frozen tokens to pixels: one by regression, one by flow matching.

Both are small ViTs that are told a token at every place, so that what they draw there is what that
token says. A place without a token gets a learned vector instead and is not drawn. A clip is
decoded time step by time step.

The flow decoder predicts the clean picture x from z_t = t x + (1 - t) noise (x-prediction; Li and
He 2025, *Back to Basics: Let Denoising Generative Models Denoise*, arXiv 2511.13720). What is the
same in all its samples is in the tokens; what differs is not.

Shape legend: M pictures (images, or time steps of clips), N tokens of a picture, P pixel values per
token, D width of the tokens, W width of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.encoders.blocks import LN_EPS, init_weights, run_blocks, transformer_blocks
from models.encoders.linear import Linear
from models.encoders.positions import sincos_table
from models.image_size import Grid

WIDTH, DEPTH, HEADS = 128, 3, 4
TIME_SHIFT, TIME_SCALE = -0.8, 0.8
"""Of the logit of t in training, as in the paper."""
LEAST_LEFT = 0.05
"""1 - t is at least this where the loss divides by it, as in the paper."""


class Decoder(nn.Module):
    """Draws the pixels of tokens, by regression: the mean of what they may stand for.

    Args:
        grid: the tokens of a picture; its time steps do not matter.
        token_width: D.
        patch_values: P.
        width: W.
        depth: number of blocks.
        heads: number of attention heads.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        token_width: int,
        patch_values: int,
        width: int = WIDTH,
        depth: int = DEPTH,
        heads: int = HEADS,
    ) -> None:
        super().__init__()
        self.embed = Linear(token_width, width)
        self.absent = nn.Parameter(torch.zeros(width))
        self.places_NW: Tensor
        self.register_buffer("places_NW", sincos_table(width, grid._replace(tubes=1)))
        self.blocks = transformer_blocks(width, depth, heads, 4.0)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.proj = Linear(width, patch_values)
        init_weights(self, "fan_in")

    def forward(self, tokens_MND: Tensor, there_MN: Tensor) -> Tensor:
        """Returns pixel values from -1 to 1, [M, N, P]; those of places without token mean nothing.

        Args:
            tokens_MND: targets, or what a predictor expects of them.
            there_MN: which places have a token, bool.
        """
        return self._draw(self._told(tokens_MND, there_MN))

    def _told(self, tokens_MND: Tensor, there_MN: Tensor) -> Tensor:
        told_MNW = torch.where(there_MN[..., None], self.embed(tokens_MND), self.absent)
        return told_MNW + self.places_NW

    def _draw(self, hidden_MNW: Tensor) -> Tensor:
        drawn: Tensor = self.proj(self.norm(run_blocks(self.blocks, hidden_MNW)))
        return drawn


class FlowDecoder(Decoder):
    """Draws one of the pictures that tokens may stand for; other noise gives another.

    Takes the arguments of `Decoder`.
    """

    def __init__(
        self, *, grid: Grid, token_width: int, patch_values: int, width: int = WIDTH, **sizes: int
    ) -> None:
        super().__init__(
            grid=grid, token_width=token_width, patch_values=patch_values, width=width, **sizes
        )
        self.noisy = Linear(patch_values, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))

    def denoise(
        self, noisy_MNP: Tensor, time_M: Tensor, tokens_MND: Tensor, there_MN: Tensor
    ) -> Tensor:
        """Returns the expected clean picture, [M, N, P], of a noisy one at times in [0, 1)."""
        told_MNW = self._told(tokens_MND, there_MN)
        noisy_MNP = noisy_MNP * there_MN[..., None]
        time_M1W = self.time(time_M[:, None])[:, None]
        return self._draw(told_MNW + self.noisy(noisy_MNP) + time_M1W)

    @torch.no_grad()
    def sample(
        self, tokens_MND: Tensor, there_MN: Tensor, generator: torch.Generator, steps: int = 20
    ) -> Tensor:
        """Draws a sample for each picture by Euler steps, [M, N, P]."""
        shape = (*there_MN.shape, self.proj.weight.shape[0])
        z_MNP = torch.randn(shape, generator=generator).to(tokens_MND.device)
        for step in range(steps):
            now, after = step / steps, (step + 1) / steps
            time_M = torch.full((len(z_MNP),), now, device=z_MNP.device)
            clean_MNP = self.denoise(z_MNP, time_M, tokens_MND, there_MN)
            z_MNP = z_MNP + (after - now) * (clean_MNP - z_MNP) / (1 - now)
        return z_MNP


def regression_loss(
    decoder: Decoder, tokens_MND: Tensor, there_MN: Tensor, pixels_MNP: Tensor
) -> Tensor:
    """Returns the mean squared error of the pixels that have a token."""
    return _mean_where(there_MN, (decoder(tokens_MND, there_MN) - pixels_MNP).square())


def flow_loss(
    decoder: FlowDecoder,
    tokens_MND: Tensor,
    there_MN: Tensor,
    pixels_MNP: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Returns the mean squared error of the velocity (x - z) / (1 - t), at random times."""
    normal_M = torch.randn(len(pixels_MNP), generator=generator)
    time_M = torch.sigmoid(TIME_SHIFT + TIME_SCALE * normal_M).to(pixels_MNP.device)
    noise_MNP = torch.randn(pixels_MNP.shape, generator=generator).to(pixels_MNP.device)
    t_M11 = time_M[:, None, None]
    noisy_MNP = t_M11 * pixels_MNP + (1 - t_M11) * noise_MNP
    clean_MNP = decoder.denoise(noisy_MNP, time_M, tokens_MND, there_MN)
    left_M11 = (1 - t_M11).clamp(min=LEAST_LEFT)
    return _mean_where(there_MN, ((clean_MNP - pixels_MNP) / left_M11).square())


def _mean_where(there_MN: Tensor, errors_MNP: Tensor) -> Tensor:
    return (errors_MNP.mean(-1) * there_MN).sum() / there_MN.sum()
