"""What actions are: how many numbers each has, and how long it may be, or which ones there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """Actions of a world, as vectors of numbers."""

    width: int
    """A, numbers of one action."""
    longest: float | None = None
    """Greatest Euclidean length of an action, in the world's units; None for any."""
    choices: tuple[tuple[float, ...], ...] | None = None
    """The only actions that there are, such as the buttons of a game that are held together, 0 or 1
    each; None where actions are any numbers."""

    @property
    def choices_KA(self) -> Tensor | None:
        """The choices as rows."""
        return None if self.choices is None else torch.tensor(self.choices, dtype=torch.float32)

    def limited(self, actions: Tensor) -> Tensor:
        """Brings actions into the range that is allowed, [..., A].

        Those that are too long are shortened and keep their direction. Where there are choices, the
        nearest one is taken.
        """
        choices_KA = self.choices_KA
        if choices_KA is not None:
            choices_KA = choices_KA.to(actions.device)
            nearest = torch.cdist(actions.reshape(-1, self.width), choices_KA).argmin(1)
            return choices_KA[nearest].view_as(actions)
        if self.longest is None:
            return actions
        length = actions.norm(dim=-1, keepdim=True)
        shortened: Tensor = actions * (self.longest / length.clamp(min=self.longest))
        return shortened
