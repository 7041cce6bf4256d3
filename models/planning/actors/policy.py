"""A policy distilled from plans: from where one is and wants to be to the action, without a search.

What the search finds in some thousand imagined steps, the network says at once: LeCun's mode 1
beside his mode 2. It is trained to say what a planner did, in states that the planner came to and
in states that itself came to (DAgger, Ross et al. 2011, arXiv 1011.0686).

Shape legend: N examples, B episodes or rows, D latent width, A action width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.planning.descent import descend
from models.planning.pairs import PairNetwork


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a planner did, and where."""

    latents_ND: Tensor
    goals_ND: Tensor
    actions_NA: Tensor

    def __add__(self, other: Examples) -> Examples:
        """Returns both one after the other."""
        return Examples(
            latents_ND=torch.cat([self.latents_ND, other.latents_ND]),
            goals_ND=torch.cat([self.goals_ND, other.goals_ND]),
            actions_NA=torch.cat([self.actions_NA, other.actions_NA]),
        )


@dataclass(frozen=True, kw_only=True)
class PolicyTraining:
    """How a policy is trained."""

    steps: int = 2000
    """Optimizer steps."""
    batch: int = 256
    """B, examples in a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW; it falls along a half cosine."""
    width: int = 128
    """Width of the hidden layers."""


class Policy(nn.Module):
    """Says the action at once.

    Args:
        latent: D.
        actions: A.
        width: of the hidden layers.
    """

    def __init__(self, latent: int, actions: int, *, width: int = 128) -> None:
        super().__init__()
        self.pairs = PairNetwork(latent, actions, width=width)

    def forward(self, latents_BD: Tensor, goals_BD: Tensor) -> Tensor:
        """Returns actions, [B, A]."""
        found: Tensor = self.pairs(latents_BD, goals_BD)
        return found


def train_policy(
    examples: Examples, training: PolicyTraining, generator: torch.Generator
) -> tuple[Policy, list[float]]:
    """Trains a policy to do as the examples do.

    Args:
        examples: what a planner did.
        training: settings.
        generator: of the rows of each step.

    Returns:
        The policy, and the loss of every step: the squared error of an action's numbers.
    """
    rows = len(examples.actions_NA)
    policy = Policy(
        examples.latents_ND.shape[1], examples.actions_NA.shape[1], width=training.width
    )
    policy.pairs.adjust(examples.latents_ND)

    def loss() -> Tensor:
        drawn_B = torch.randint(rows, (training.batch,), generator=generator)
        said_BA = policy(examples.latents_ND[drawn_B], examples.goals_ND[drawn_B])
        return functional.mse_loss(said_BA, examples.actions_NA[drawn_B])

    taken = descend(policy.parameters(), loss, steps=training.steps, lr=training.lr)
    losses = [float(found) for found in taken]
    return policy.eval().requires_grad_(False), losses


class PolicyAgent:
    """Acts by a policy; it stands where `models.planning.agent.Agent` does.

    Args:
        encode: encodes observations as latents [B, D].
        policy: says the actions.
        limit: brings actions into the range that is allowed.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        policy: Policy,
        limit: Callable[[Tensor], Tensor],
    ) -> None:
        self.encode, self.policy, self.limit = encode, policy, limit

    @torch.no_grad()
    def begin(self, goals: Tensor) -> None:
        """Begins episodes, given observations of their goals."""
        self._goals_BD = self.encode(goals)

    @torch.no_grad()
    def plan(self, observations: Tensor, rows: Tensor, hidden_B: Tensor | None = None) -> Tensor:
        """Returns plans of one action, [len(rows), 1, A]; what is hidden it does not know of."""
        return self.limit(self.policy(self.encode(observations), self._goals_BD[rows]))[:, None]
