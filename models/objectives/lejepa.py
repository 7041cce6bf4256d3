"""LeJEPA (Balestriero and LeCun, 2025, arXiv 2511.08544): views of a sample agree, and all samples
together look like a standard normal distribution. No teacher, predictor or stopped gradient.

On clips it is LeVJEPA (2026, arXiv 2608.27395) in its essentials: every view keeps a few random
tokens.

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
    """(1 - weight) * invariance + weight * SIGReg, the latter of every view by itself, averaged.

    Args:
        encoder: see `JointEmbedding`, as all that is not named here.
        views: as there.
        sigreg: the statistic.
        weight: of SIGReg, between 0 (the negative control: everything collapses) and 1.
        projector: as there.
        mean: as there.
        std: as there.
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
        """Mean squared distance to the views' mean, and SIGReg."""
        invariance = (embedded_VBE - embedded_VBE.mean(0)).square().mean()
        spread = torch.stack([self.sigreg(view_BE) for view_BE in embedded_VBE]).mean()
        loss = (1 - self.weight) * invariance + self.weight * spread
        return loss, {"invariance": invariance.detach(), "sigreg": spread.detach()}

    def after_step(self, step: int, total_steps: int) -> None:
        """The next step has other slices."""
        self.sigreg.advance()


@register_objective("levjepa")
class LeVJEPA(LeJEPA):
    """LeJEPA on clips."""

    pixels: ClassVar[str] = "clips"
