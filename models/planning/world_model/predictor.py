"""The action-conditioned predictor: the next latent from a latent and an action.

    h_0     = A z
    h_l     = h_(l-1) + gate_l(a) * MLP_l( LN(h_(l-1)) * (1 + scale_l(a)) + shift_l(a) )
    z_next  = z + B LN(h_L)

Actions modulate every block, as the time of a diffusion model does (AdaLN-Zero, Peebles and Xie
2023, arXiv 2212.09748). B starts at zero, so the untrained predictor says that nothing changes.

Shape legend: B rows, T steps, D latent width, A action width, P predictor width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ActionBlock(nn.Module):
    """A residual MLP that an embedded action modulates.

    Args:
        width: P.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden_BP: Tensor, action_BP: Tensor) -> Tensor:
        """Returns the new hidden state, [B, P]."""
        scale_BP, shift_BP, gate_BP = self.modulation(action_BP).chunk(3, dim=-1)
        update_BP: Tensor = self.mlp(self.norm(hidden_BP) * (1 + scale_BP) + shift_BP)
        changed_BP: Tensor = hidden_BP + gate_BP * update_BP
        return changed_BP


class LatentPredictor(nn.Module):
    """Predicts the next latent.

    Args:
        latent: D.
        actions: A.
        width: P.
        depth: number of blocks.
    """

    def __init__(self, *, latent: int, actions: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed_latent = nn.Linear(latent, width)
        self.embed_action = nn.Sequential(nn.Linear(actions, width), nn.SiLU())
        self.blocks = nn.ModuleList(ActionBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.change = nn.Linear(width, latent)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, latent_BD: Tensor, action_BA: Tensor) -> Tensor:
        """Returns the latent after the action, [B, D]."""
        hidden_BP, action_BP = self.embed_latent(latent_BD), self.embed_action(action_BA)
        for block in self.blocks:
            hidden_BP = block(hidden_BP, action_BP)
        change_BD: Tensor = self.change(self.norm(hidden_BP))
        return latent_BD + change_BD

    def rollout(self, latent_BD: Tensor, actions_BTA: Tensor) -> Tensor:
        """Returns the latents after each of T actions, from one to the next, [B, T, D]."""
        found = []
        for action_BA in actions_BTA.unbind(1):
            latent_BD = self(latent_BD, action_BA)
            found.append(latent_BD)
        return torch.stack(found, dim=1)
