"""A network of pairs: what is said of where one is and where one wants to be.

Shape legend: N latents, B pairs, D latent width, X outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.encoders.linear import use_linear


class PairNetwork(nn.Module):
    """An MLP of a latent, a goal's latent and the way between them.

    Args:
        latent: D.
        outputs: X.
        width: of the hidden layers.
    """

    def __init__(self, latent: int, outputs: int, *, width: int) -> None:
        super().__init__()
        self.mean_D: Tensor
        self.deviation: Tensor
        self.register_buffer("mean_D", torch.zeros(latent))
        self.register_buffer("deviation", torch.ones(()))
        self.layers = nn.Sequential(
            nn.Linear(3 * latent, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, outputs),
        )
        use_linear(self.layers, least=0)  # a search gives them thousands of rows

    def adjust(self, latents_ND: Tensor) -> None:
        """Makes the mean and spread of some latents those of the network's input."""
        self.mean_D.copy_(latents_ND.mean(0))
        # One number for all dimensions, so that what hardly varies stays small.
        self.deviation.copy_((latents_ND - self.mean_D).square().mean().sqrt())

    def forward(self, latents_BD: Tensor, goals_BD: Tensor) -> Tensor:
        """Returns the outputs of pairs, [..., D] to [..., X]."""
        latents_BD = (latents_BD - self.mean_D) / self.deviation
        goals_BD = (goals_BD - self.mean_D) / self.deviation
        way_BD = goals_BD - latents_BD
        pairs = torch.cat([latents_BD.expand_as(way_BD), goals_BD.expand_as(way_BD), way_BD], -1)
        found: Tensor = self.layers(pairs)
        return found
