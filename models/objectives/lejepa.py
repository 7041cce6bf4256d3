"""LeJEPA (Balestriero and LeCun, 2025, arXiv 2511.08544).

The views of a sample are trained to agree, and the embeddings of all samples to follow a standard
normal distribution. There is no teacher, no predictor and no stopped gradient.

On clips this is the essence of LeVJEPA (2026, arXiv 2608.27395), where every view keeps a few
random tokens.

Shape legend: B images or clips, V views, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch

from models.encoders.from_settings import Settings, encoder_from_settings
from models.encoders.vit import VisionTransformer
from models.objectives.joint_embedding import JointEmbedding
from models.objectives.objective import pixel_statistics
from models.objectives.registry import register_objective
from models.objectives.sigreg import SIGReg, sigreg_from_settings
from models.views import Views


@register_objective("lejepa")
class LeJEPA(JointEmbedding):
    """Minimises (1 - weight) * invariance + weight * SIGReg.

    SIGReg is computed for each view separately and then averaged over the views.

    Args:
        encoder: see `JointEmbedding`.
        views: see `JointEmbedding`.
        sigreg: computes the statistic.
        weight: weight of SIGReg, between 0 and 1; at 0, the negative control, everything collapses.
        projector: see `JointEmbedding`.
        mean: see `JointEmbedding`.
        std: see `JointEmbedding`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        views: Views,
        sigreg: SIGReg,
        *,
        weight: float,
        projector: Sequence[int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__(
            encoder,
            views,
            projector=projector,
            mean=mean,
            std=std,
        )
        self.sigreg, self.weight = sigreg, weight

    @classmethod
    def from_settings(cls, model: Settings, objective: Settings) -> Self:
        """See `EncoderObjective.from_settings`."""
        return cls(
            encoder_from_settings(model),
            Views.of(objective["views"], model["image_size"]),
            sigreg_from_settings(objective),
            weight=objective["sigreg_weight"],
            projector=objective["projector"],
            **pixel_statistics(model),
        )

    def compare(self, embedded_VBE: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Combines the mean squared distance of views to their mean with SIGReg.

        See `JointEmbedding.compare` for arguments and result.
        """
        invariance = (embedded_VBE - embedded_VBE.mean(0)).square().mean()
        spread = torch.stack([self.sigreg(view_BE) for view_BE in embedded_VBE]).mean()
        loss = (1 - self.weight) * invariance + self.weight * spread
        return loss, {"invariance": invariance.detach(), "sigreg": spread.detach()}

    def after_step(self, step: int, total_steps: int) -> None:
        """Draws new slices for the next step."""
        self.sigreg.advance()


@register_objective("levjepa")
class LeVJEPA(LeJEPA):
    """LeJEPA on clips."""

    pixels: ClassVar[str] = "clips"
