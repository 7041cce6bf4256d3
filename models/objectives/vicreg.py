"""VICReg (Bardes, Ponce and LeCun, 2022, arXiv 2105.04906): variance-invariance-covariance
regularization.

Shape legend: B images, V views, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from models.encoders.from_settings import Settings, encoder_from_settings
from models.encoders.vit import VisionTransformer
from models.objectives.joint_embedding import JointEmbedding
from models.objectives.objective import pixel_statistics
from models.objectives.registry import register_objective
from models.synced import mean_over_processes, world_size
from models.views import Views

STD_EPS = 1e-4  # section 4.1, equation 2


@register_objective("vicreg")
class VICReg(JointEmbedding):
    """Trains views to agree while embedding dimensions keep their variance and stay uncorrelated.

    The standard deviation of every dimension is pushed up to at least 1.

    Args:
        encoder: see `JointEmbedding`.
        views: see `JointEmbedding`; the paper uses two views.
        weights: weights of invariance, variance and covariance; 25, 25 and 1 in the paper. If the
            last two are 0, the negative control, everything collapses.
        projector: see `JointEmbedding`.
        mean: see `JointEmbedding`.
        std: see `JointEmbedding`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        views: Views,
        *,
        weights: tuple[float, float, float],
        projector: Sequence[int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__(encoder, views, projector=projector, mean=mean, std=std)
        self.weights = weights

    @classmethod
    def from_settings(cls, model: Settings, objective: Settings) -> Self:
        """See `EncoderObjective.from_settings`."""
        return cls(
            encoder_from_settings(model),
            Views.of(objective["views"], model["image_size"]),
            weights=tuple(objective["vicreg_weights"]),
            projector=objective["projector"],
            **pixel_statistics(model),
        )

    def compare(self, embedded_VBE: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes equation 6; see `JointEmbedding.compare` for arguments and result.

        With more than two views, the invariance term is the mean over all pairs of views.
        """
        V = embedded_VBE.shape[0]
        # The mean of |a - b|^2 over pairs is 2 V / (V - 1) times the mean squared distance to the
        # mean.
        spread = (embedded_VBE - embedded_VBE.mean(0)).square().mean()
        invariance = 2 * V / (V - 1) * spread
        terms = [variance_and_covariance(view_BE) for view_BE in embedded_VBE]
        variance, covariance = (torch.stack(term).mean() for term in zip(*terms, strict=True))
        parts = (invariance, variance, covariance)
        # The paper adds up the terms of its two views, so a mean over views counts twice.
        sums = (invariance, 2 * variance, 2 * covariance)
        loss = torch.stack([w * s for w, s in zip(self.weights, sums, strict=True)]).sum()
        names = ("invariance", "variance", "covariance")
        return loss, {n: p.detach() for n, p in zip(names, parts, strict=True)}


def variance_and_covariance(rows_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes equations 1 to 4 for the rows of all processes together.

    Args:
        rows_BE: embeddings of one view, fp32 [B, E].

    Returns:
        Two scalars: by how much standard deviations fall short of 1, averaged over dimensions, and
        the sum of all squared covariances of two different dimensions, divided by E.
    """
    count, E = rows_BE.shape[0] * world_size(), rows_BE.shape[1]
    centred_BE = rows_BE - mean_over_processes(rows_BE.mean(0))
    second_EE = mean_over_processes(centred_BE.T @ centred_BE / rows_BE.shape[0])
    covariance_EE = second_EE * (count / (count - 1))
    deviation_E = (covariance_EE.diagonal() + STD_EPS).sqrt()
    off_diagonal = covariance_EE.square().sum() - covariance_EE.diagonal().square().sum()
    return (1 - deviation_E).clamp(min=0).mean(), off_diagonal / E
