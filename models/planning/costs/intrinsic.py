"""The intrinsic cost of imagined futures: pure functions without weights, and their weighted sum.

Every term maps an imagined future to a cost a step. What cannot change cannot be cheated: no
training reaches these functions (LeCun 2022, *A Path Towards Autonomous Machine Intelligence*,
section 3.2). What is learned of the cost to come is the critic's (`critic.py`).

Shape legend: B candidates, T steps, D latent width, A action width, E predictors, 2 = (x, y).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Zone = tuple[float, float, float, float]
"""Left, top, right and bottom of a region to stay out of, in the units of the readout."""


@dataclass(frozen=True, kw_only=True)
class Future:
    """What a world model imagines of candidate actions, and what is wanted."""

    latents_EBTD: Tensor
    """The latents after each step, by each predictor of the ensemble."""
    actions_BTA: Tensor
    goals_BD: Tensor
    """The latent of each candidate's goal."""


def goal_distance(future: Future) -> Tensor:
    """Returns the Euclidean distance of the latents from the goal's, mean over predictors, [B, T].

    Summed over the steps, as plans are judged, it also rewards being there early. In
    eb_jepa's ablation the sum reached 97% of goals where the last step alone reached 89%.
    """
    distance_EBT: Tensor = (future.latents_EBTD - future.goals_BD[:, None]).norm(dim=-1)
    return distance_EBT.mean(0)


def effort(future: Future) -> Tensor:
    """Returns the squared length of the actions, [B, T]."""
    return future.actions_BTA.square().sum(-1)


def uncertainty(future: Future) -> Tensor:
    """Returns how far the predictors are apart: the root of their mean variance, [B, T].

    It is zero with a single predictor.
    """
    return future.latents_EBTD.var(0, unbiased=False).mean(-1).sqrt()


@dataclass(frozen=True, kw_only=True)
class Hazard:
    """How deep imagined places lie in regions to stay out of, [B, T]; zero where they are clear."""

    zones: tuple[Zone, ...]
    readout: Callable[[Tensor], Tensor]
    """Maps latents [..., D] to places [..., 2], as a probe does."""
    clearance: float = 0.0
    """Distance to keep from the regions: what is imagined and read off is never exact."""

    def __call__(self, future: Future) -> Tensor:
        """Returns the depth of the mean predictor's places in the deepest zone, and clearance."""
        places_BT2 = self.readout(future.latents_EBTD.mean(0))
        return (depth(places_BT2, self.zones) + self.clearance).clamp(min=0)


def depth(places_2: Tensor, zones: Sequence[Zone]) -> Tensor:
    """Returns how deep places lie in the deepest of some zones, [..., 2] to [...].

    It is the distance to the nearest side, negative outside, and minus infinity without zones.
    """
    deepest = places_2.new_full(places_2.shape[:-1], -torch.inf)
    for left, top, right, bottom in zones:
        low_2 = places_2 - places_2.new_tensor([left, top])
        high_2 = places_2.new_tensor([right, bottom]) - places_2
        deepest = torch.maximum(deepest, torch.cat([low_2, high_2], dim=-1).amin(-1))
    return deepest


Term = Callable[[Future], Tensor]
"""A cost of every step, [B, T]."""


@dataclass(frozen=True, kw_only=True)
class IntrinsicCost:
    """A weighted sum of terms."""

    terms: tuple[tuple[float, Term], ...] = field(default=((1.0, goal_distance),))
    """Weights and terms."""

    def __call__(self, future: Future) -> Tensor:
        """Returns the cost of every step, [B, T]."""
        cost_BT = future.actions_BTA.new_zeros(future.actions_BTA.shape[:2])
        for weight, term in self.terms:
            cost_BT = cost_BT + weight * term(future)
        return cost_BT
