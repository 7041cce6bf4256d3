"""The action-conditioned predictor: the next latent from a latent and an action.

    h_0     = A z
    h_l     = h_(l-1) + gate_l(a) * MLP_l( LN(h_(l-1)) * (1 + scale_l(a)) + shift_l(a) )
    z_next  = z + B LN(h_L)

Actions modulate every block, as the time of a diffusion model does (AdaLN-Zero, Peebles and Xie
2023, arXiv 2212.09748). B starts at zero, so the untrained predictor says that nothing changes.

With a history the state is the latents of the last frames side by side, the newest last: z is their
newest, and A reads all of them. One frame does not say how fast things move.

Shape legend: B rows, T frames or steps, D latent width, Z = history * D, A action width, P
predictor width.
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


class Dynamics(nn.Module):
    """What actions do to latents."""

    def rollout(self, state_BZ: Tensor, actions_BTA: Tensor) -> Tensor:
        """Returns the states after each of T actions, from one to the next, [B, T, Z]."""
        raise NotImplementedError

    def errors(self, states_BTZ: Tensor, actions_BTA: Tensor) -> dict[str, Tensor]:
        """Returns the terms of the loss by name, before their mean over clips and steps.

        Args:
            states_BTZ: at T frames of clips.
            actions_BTA: between them, T - 1.

        Returns:
            Errors [B, S] of the S frames after the first that are predicted.
        """
        raise NotImplementedError


class LatentPredictor(Dynamics):
    """Predicts the next latent.

    Args:
        latent: D.
        actions: A.
        width: P.
        depth: number of blocks.
        history: frames whose latents make a state.
    """

    def __init__(
        self, *, latent: int, actions: int, width: int, depth: int, history: int = 1
    ) -> None:
        super().__init__()
        self.latent = latent
        self.embed_latent = nn.Linear(history * latent, width)
        self.embed_action = nn.Sequential(nn.Linear(actions, width), nn.SiLU())
        self.blocks = nn.ModuleList(ActionBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.change = nn.Linear(width, latent)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, state_BZ: Tensor, action_BA: Tensor) -> Tensor:
        """Returns the state after the action, [B, Z]."""
        hidden_BP, action_BP = self.embed_latent(state_BZ), self.embed_action(action_BA)
        for block in self.blocks:
            hidden_BP = block(hidden_BP, action_BP)
        newest_BD = state_BZ[:, -self.latent :] + self.change(self.norm(hidden_BP))
        return torch.cat([state_BZ[:, self.latent :], newest_BD], dim=-1)

    def rollout(self, state_BZ: Tensor, actions_BTA: Tensor) -> Tensor:
        """See `Dynamics.rollout`."""
        found = []
        for action_BA in actions_BTA.unbind(1):
            state_BZ = self(state_BZ, action_BA)
            found.append(state_BZ)
        return torch.stack(found, dim=1)

    def errors(self, states_BTZ: Tensor, actions_BTA: Tensor) -> dict[str, Tensor]:
        """See `Dynamics.errors`: the squared error of all frames, imagined from the first state."""
        future_BTZ = self.rollout(states_BTZ[:, 0], actions_BTA)
        wrong_BTZ = future_BTZ - states_BTZ[:, 1:]
        return {"prediction": wrong_BTZ[..., -self.latent :].square().mean(-1)}
