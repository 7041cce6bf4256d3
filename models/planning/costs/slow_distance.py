"""Distance in slow features: linear functions of the latents that change little from step to step.

    C       covariance of the latents,  S  mean (z_(t+1) - z_t)(z_(t+1) - z_t)^T  over walks
    S u_i   = l_i C u_i,   u_i^T C u_i = 1      slow feature analysis (Wiskott and Sejnowski 2002)
    d(z, g) = | U^T (z - g) / l |

What keeps latents from collapsing gives every dimension the same variance, whether it tells rooms
apart or the corners of a pixel. Their distance therefore says what is near, and is the same for all
that is far. A feature that hardly changes in a step says what is far. On a walk the features are
those of its Laplacian, and dividing them by their rates gives the biharmonic distance (Lipman et
al. 2010), which grows with the length of the way. It is fitted in closed form, on walks alone.

Shape legend: B candidates or walks, T steps, D latent width, E predictors, F features, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.planning.costs.intrinsic import Future

LEAST_VARIANCE = 1e-4
"""Least variance of a direction that counts, as a share of the greatest: below it is noise."""
LEAST_RATE = 1e-4
"""Least rate that features are divided by."""


@dataclass(frozen=True, kw_only=True)
class SlowDistance:
    """The Euclidean distance from the goal in slow features, a term as `goal_distance`."""

    features_DF: Tensor
    """Maps latents to features, each divided by its rate."""

    @classmethod
    def fit(cls, latents_BTD: Iterable[Tensor]) -> SlowDistance:
        """Fits the features to the latents of walks, which may differ in length.

        The mean squared length of a step is that in the latents, so that both distances have the
        same units.
        """
        walks = [latents_TD.double() for latents_TD in latents_BTD]
        rows_ND = torch.cat(walks)
        rows_ND = rows_ND - rows_ND.mean(0)
        steps_ND = torch.cat([latents_TD.diff(dim=0) for latents_TD in walks])
        variance_D, axes_DD = torch.linalg.eigh(rows_ND.T @ rows_ND / len(rows_ND))
        kept_D = variance_D > LEAST_VARIANCE * variance_D.amax()
        white_DF = axes_DD[:, kept_D] / variance_D[kept_D].sqrt()
        moved_NF = steps_ND @ white_DF
        rate_F, turned_FF = torch.linalg.eigh(moved_NF.T @ moved_NF / len(moved_NF))
        features_DF = (white_DF @ turned_FF) / rate_F.clamp(min=LEAST_RATE)
        scale = steps_ND.square().sum(-1).mean() / (steps_ND @ features_DF).square().sum(-1).mean()
        return cls(features_DF=(features_DF * scale.sqrt()).float())

    def __call__(self, future: Future) -> Tensor:
        """Returns the distance from the goal at every step, mean over predictors, [B, T]."""
        return self.between(future.latents_EBTD, future.goals_BD[:, None]).mean(0)

    def between(self, latents: Tensor, others: Tensor) -> Tensor:
        """Returns the distance of latents, [..., D] to [...]."""
        distance: Tensor = ((latents - others) @ self.features_DF).norm(dim=-1)
        return distance
