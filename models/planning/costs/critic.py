"""The trainable critic: how far it still is to a goal, by the ways that the memory knows.

    d_i(g)    = 0 where state i is the goal, else the least of
                  |s_i - z_i| + |s_i - z_j| + d_j(g)    s_i followed state i, j is beside it
                  |z_i - z_j| + d_j(g)                  j is beside state i
    V(z, g)   = a network that is fitted to d

Distance is not reachability: across a wall the goal is near and the way is far. The memory's states
are the nodes of a graph whose edges are shorter than `reach`, so no edge leads through what no
state lies in. Value iteration over it gives the length of the way from everywhere to some goals
(after Eysenbach et al. 2019, *Search on the Replay Buffer*, arXiv 1906.05253), and the network
generalises to all pairs. Lengths are in the units of latent distance, so that V can stand in the
place of the distance to the goal.

Shape legend: N states in the memory, B rows, D latent width, G goals, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.planning.descent import descend
from models.planning.memory import Memory
from models.planning.pairs import PairNetwork

NEIGHBOURS = 12
"""K, edges of a kind that leave a state at most."""
PAIRS = 2**26
"""Distances that are in memory at the same time, 256 MiB."""
ROUNDS = 200
"""Most rounds of value iteration: edges of the longest way."""


class Critic(nn.Module):
    """V(z, g) as an MLP.

    Args:
        latent: D.
        width: of the hidden layers.
        told: last dimensions of a goal that count, those that its picture tells; None for all.
    """

    def __init__(self, latent: int, *, width: int = 128, told: int | None = None) -> None:
        super().__init__()
        self.told = told
        self.pairs = PairNetwork(latent, 1, width=width)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def adjust(self, latents_ND: Tensor, scale: float) -> None:
        """Adjusts the network to some latents.

        Args:
            latents_ND: the latents.
            scale: a typical length of a way, in units of latent distance.
        """
        self.pairs.adjust(latents_ND)
        self.scale.fill_(scale)

    def forward(self, latents_BD: Tensor, goals_BD: Tensor) -> Tensor:
        """Returns the length of the way that is left, [..., D] to [...]."""
        if self.told is not None:
            D, device = goals_BD.shape[-1], goals_BD.device
            hidden_D = torch.arange(D, device=device) < D - self.told
            goals_BD = goals_BD.masked_fill(hidden_D, 0)
        found: Tensor = functional.softplus(self.pairs(latents_BD, goals_BD).squeeze(-1))
        return found * self.scale


@dataclass(frozen=True, kw_only=True)
class CriticTraining:
    """How a critic is trained."""

    goals: int = 400
    """G, states of the memory to which ways are measured."""
    reach: float = 1.0
    """Length of the longest edge, in median lengths of the memory's own steps."""
    steps: int = 1500
    """Optimizer steps."""
    batch: int = 1024
    """B, pairs of a state and a goal in a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW; it falls along a half cosine."""
    told: int | None = None
    """Last dimensions of a goal that its picture tells; None for all."""


def train_critic(
    memory: Memory, training: CriticTraining, generator: torch.Generator
) -> tuple[Critic, list[float]]:
    """Trains a critic on what a memory holds.

    Args:
        memory: its keys are latents of states, and its column `following` those that came next.
        training: settings.
        generator: of the goals and the pairs.

    Returns:
        The critic, and the loss of every step, in units of the squared scale.
    """
    rows = memory.recent(len(memory))
    latents_ND, following_ND = rows["key"], rows["following"]
    goals_G = torch.randperm(len(latents_ND), generator=generator)[: training.goals]
    reach = training.reach * float((following_ND - latents_ND).norm(dim=-1).median())
    ways_NG = ways_to(latents_ND, following_ND, goals_G, reach)
    known_P2 = ways_NG.isfinite().nonzero()
    scale = float(ways_NG[ways_NG.isfinite()].mean())
    critic = Critic(latents_ND.shape[1], told=training.told)
    critic.adjust(latents_ND, scale)

    def loss() -> Tensor:
        drawn_B = torch.randint(len(known_P2), (training.batch,), generator=generator)
        state_B, goal_B = known_P2[drawn_B].unbind(1)
        found_B = critic(latents_ND[state_B], latents_ND[goals_G[goal_B]])
        return functional.smooth_l1_loss(found_B / scale, ways_NG[state_B, goal_B] / scale)

    taken = descend(critic.parameters(), loss, steps=training.steps, lr=training.lr)
    losses = [float(found) for found in taken]
    return critic.eval().requires_grad_(False), losses


def ways_to(latents_ND: Tensor, following_ND: Tensor, goals_G: Tensor, reach: float) -> Tensor:
    """Measures the shortest ways to some states, [N, G]; infinite where none is known.

    Args:
        latents_ND: the states.
        following_ND: what followed each of them.
        goals_G: numbers of the states that are goals.
        reach: length of the longest edge between neighbours.
    """
    beside = _edges(latents_ND, latents_ND, reach)
    after = _edges(following_ND, latents_ND, reach)
    step_N1 = (following_ND - latents_ND).norm(dim=-1)[:, None]
    ids_NK = torch.cat([beside[0], after[0]], dim=1)
    length_NK = torch.cat([beside[1], step_N1 + after[1]], dim=1)
    ways_NG = latents_ND.new_full((len(latents_ND), len(goals_G)), torch.inf)
    ways_NG[goals_G, torch.arange(len(goals_G))] = 0
    for _ in range(ROUNDS):
        before_NG = ways_NG
        for ids_N, length_N in zip(ids_NK.unbind(1), length_NK.unbind(1), strict=True):
            ways_NG = torch.minimum(ways_NG, length_N[:, None] + before_NG[ids_N])
        if torch.equal(ways_NG, before_NG):
            break
    return ways_NG


def _edges(from_ND: Tensor, to_ND: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Returns the nearest states of each, and their distance, infinite beyond `reach`, [N, K]."""
    K, rows = min(NEIGHBOURS, len(to_ND)), max(1, PAIRS // len(to_ND))
    found = [
        torch.cdist(part_ND, to_ND).topk(K, dim=1, largest=False)
        for part_ND in torch.split(from_ND, rows)
    ]
    length_NK = torch.cat([part.values for part in found])
    ids_NK = torch.cat([part.indices for part in found])
    return ids_NK, length_NK.masked_fill(length_NK > reach, torch.inf)
