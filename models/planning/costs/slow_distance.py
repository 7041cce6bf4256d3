"""Distance in slow features: linear functions of the latents that change little from step to step.

    C       covariance of the latents,  S  mean (z_(t+1) - z_t)(z_(t+1) - z_t)^T  over walks
    S u_i   = l_i C u_i,   u_i^T C u_i = 1      slow feature analysis (Wiskott and Sejnowski 2002)
    d(z, g) = | U^T (z - g) / l |

What keeps latents from collapsing gives every dimension the same variance, whether it tells rooms
apart or the corners of a pixel. Their distance therefore says what is near, and is the same for all
that is far. A feature that hardly changes in a step says what is far. On a walk the features are
those of its Laplacian, and dividing them by their rates gives the biharmonic distance (Lipman et
al. 2010), which grows with the length of the way. It is fitted in closed form, on walks alone.

What is slow is what changes little over `lag` steps. Where views change with every turn, one step
says little of what changes on a way of many.

A goal is one picture, and a state may hold more than one picture tells, such as what a recurrent
network keeps. Then a goal's features are those that its picture lets expect: a ridge regression
from the part of a state that a picture gives, P of its D dimensions, to the features, on the same
walks.

    d(s, g) = | U^T s / l - (A^T g_P + c) |

Shape legend: B candidates or walks, T steps, D latent width, E predictors, F features, P told
dimensions, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.planning.costs.intrinsic import Future
from models.planning.world_model.readout import Readout

LEAST_VARIANCE = 1e-4
"""Least variance of a direction that counts, as a share of the greatest: below it is noise."""
LEAST_RATE = 1e-4
"""Least rate that features are divided by."""


@dataclass(frozen=True, kw_only=True)
class SlowDistance:
    """The Euclidean distance from the goal in slow features, a term as `goal_distance`."""

    features_DF: Tensor
    """Maps latents to features, each divided by its rate."""
    goals: Readout | None = None
    """Reads the features of goals off what their pictures tell; None takes them as states."""

    @classmethod
    def fit(
        cls,
        latents_BTD: Iterable[Tensor],
        *,
        lag: int = 1,
        most: int | None = None,
        told: int | None = None,
    ) -> SlowDistance:
        """Fits the features to the latents of walks, which may differ in length.

        The mean squared length of a step is that in the latents, so that both distances have the
        same units.

        Args:
            latents_BTD: of the walks.
            lag: steps over which features are to change little.
            most: F, the slowest features that are kept; None keeps all.
            told: P, the last dimensions, which a single picture tells; None for all.

        Raises:
            ValueError: no walk has more than `lag` steps.
        """
        walks = [latents_TD.double() for latents_TD in latents_BTD]
        seen_ND = torch.cat(walks)
        rows_ND = seen_ND - seen_ND.mean(0)
        later_ND = torch.cat([latents_TD[lag:] - latents_TD[:-lag] for latents_TD in walks])
        if not len(later_ND):
            raise ValueError(f"slow features over {lag} steps need longer walks")
        variance_D, axes_DD = torch.linalg.eigh(rows_ND.T @ rows_ND / len(rows_ND))
        kept_D = variance_D > LEAST_VARIANCE * variance_D.amax()
        white_DF = axes_DD[:, kept_D] / variance_D[kept_D].sqrt()
        moved_NF = later_ND @ white_DF
        rate_F, turned_FF = torch.linalg.eigh(moved_NF.T @ moved_NF / len(moved_NF))
        features_DF = ((white_DF @ turned_FF) / rate_F.clamp(min=LEAST_RATE))[:, :most]
        steps_ND = torch.cat([latents_TD.diff(dim=0) for latents_TD in walks])
        scale = steps_ND.square().sum(-1).mean() / (steps_ND @ features_DF).square().sum(-1).mean()
        features_DF = features_DF * scale.sqrt()
        goals = None if told is None else Readout.fit(seen_ND[:, -told:], seen_ND @ features_DF)
        return cls(features_DF=features_DF.float(), goals=goals)

    def __call__(self, future: Future) -> Tensor:
        """Returns the distance from the goal at every step, mean over predictors, [B, T]."""
        return self.between(future.latents_EBTD, future.goals_BD[:, None]).mean(0)

    def between(self, latents: Tensor, goals: Tensor) -> Tensor:
        """Returns the distance of latents from goals, [..., D] to [...]."""
        if self.goals is None:
            near: Tensor = ((latents - goals) @ self.features_DF).norm(dim=-1)
            return near
        wanted = self.goals(goals[..., -(len(self.goals.weight_D2) - 1) :])
        distance: Tensor = (latents @ self.features_DF - wanted).norm(dim=-1)
        return distance
