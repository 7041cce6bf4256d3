"""Masked autoencoders (He et al., 2022, arXiv 2111.06377) reconstruct the pixels of hidden patches.

Shape legend: B images or clips, N patches, K visible tokens, T hidden tokens, P pixel values per
patch, D width.
"""

from __future__ import annotations

from typing import Self

import torch
from torch.nn import functional

from models.encoders.from_settings import (
    Settings,
    encoder_from_settings,
    predictor_from_settings,
)
from models.encoders.kept_tokens import KeptTokens, grids_of
from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer, gather_tokens
from models.media.preprocessing import normalize
from models.objectives.objective import Batch, EncoderObjective, Output, pixel_statistics
from models.objectives.registry import register_objective

PIXEL_EPS = 1e-6


@register_objective("mae")
class MAE(EncoderObjective):
    """Reconstructs hidden patches with a decoder from the encoder's tokens of visible patches.

    The decoder is discarded after training.

    Args:
        encoder: the network that is kept; on whole images, the mean of its tokens is evaluated.
        decoder: a predictor whose output has width P.
        norm_pixels: normalises every target patch by its own mean and standard deviation, the
            better variant in section 4 of the paper.
        mean: channel means that are subtracted from the pixels, of values in [0, 1].
        std: channel standard deviations that the pixels are divided by.
    """

    inputs = ("images", "context_ids", "target_ids")

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: Predictor,
        *,
        norm_pixels: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__(encoder, mean=mean, std=std)
        self.decoder, self.norm_pixels = decoder, norm_pixels

    @classmethod
    def from_settings(cls, model: Settings, objective: Settings) -> Self:
        """See `EncoderObjective.from_settings`."""
        encoder = encoder_from_settings(model)
        pixels = 3 * encoder.tubelet * encoder.patch_size**2
        decoder = predictor_from_settings(model, encoder, output_width=pixels)
        return cls(
            encoder, decoder, norm_pixels=objective["norm_pixels"], **pixel_statistics(model)
        )

    def forward(self, batch: Batch) -> Output:
        """Computes the mean squared error of the hidden patches.

        Args:
            batch: `images`, `context_ids` [B, K] and `target_ids` [B, 1, T]; see `Batch`.
        """
        masks = (batch["context_ids"], batch["target_ids"])
        return self._paint(batch["images"], *masks, grids_of(KeptTokens.of(batch)))

    def _paint(
        self,
        pixels: torch.Tensor,
        context_ids_BK: torch.Tensor,
        target_ids_B1T: torch.Tensor,
        grids_B2: torch.Tensor | None,
    ) -> Output:
        patches_BNP = self.encoder.patch_embed.patchify(normalize(pixels, self.mean, self.std))
        context_BKD = self.encoder.forward_patches(patches_BNP, context_ids_BK, grids_B2)
        painted_B1TP = self.decoder(context_BKD, context_ids_BK, target_ids_B1T, grids_B2=grids_B2)
        targets_BNP = self.targets(patches_BNP)
        targets_BTP = gather_tokens(targets_BNP, target_ids_B1T.flatten(1))
        loss = functional.mse_loss(painted_B1TP.flatten(1, 2).float(), targets_BTP)
        # No pass covers the whole image, so the collapse watch reads the visible tokens.
        return Output(loss, monitored={"target_pooled": context_BKD.mean(1).float()})

    def targets(self, patches_BNP: torch.Tensor) -> torch.Tensor:
        """Returns the values to reconstruct for every patch: [B, N, P] to [B, N, P]."""
        if not self.norm_pixels:
            return patches_BNP
        variance, mean = torch.var_mean(patches_BNP, dim=-1, keepdim=True)
        return (patches_BNP - mean) / (variance + PIXEL_EPS).sqrt()


@register_objective("videomae")
class VideoMAE(MAE):
    """MAE on clips, whose tokens are tubelets (Tong et al., 2022, arXiv 2203.12602).

    It works best with tube masks, which hide the same patches at all times, so that hidden pixels
    cannot be copied from the next frame. Unlike in the paper, any masker can choose what is hidden,
    for example V-JEPA's blocks.
    """

    inputs = ("clips", "context_ids_0", "target_ids_0")

    def forward(self, batch: Batch) -> Output:
        """Computes the mean squared error of the hidden tubelets.

        Args:
            batch: `clips`, `context_ids_0` [B, K] and `target_ids_0` [B, T]; see `Batch`.
        """
        masks = (batch["context_ids_0"], batch["target_ids_0"][:, None])
        return self._paint(batch["clips"], *masks, grids_of(KeptTokens.of(batch)))
