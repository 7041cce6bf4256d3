"""What actions are: how many numbers each has, and how long it may be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """Actions of a world, as vectors of numbers."""

    width: int
    """A, numbers of one action."""
    longest: float | None = None
    """Greatest Euclidean length of an action, in the world's units; None for any."""

    def limited(self, actions: Tensor) -> Tensor:
        """Shortens actions that are too long and keeps their direction, [..., A]."""
        if self.longest is None:
            return actions
        length = actions.norm(dim=-1, keepdim=True)
        shortened: Tensor = actions * (self.longest / length.clamp(min=self.longest))
        return shortened
