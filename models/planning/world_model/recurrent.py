"""States for worlds in which one view does not say where one is: a recurrent network's, and views.

    r_t     = GRU(r_(t-1), z_t)                        what the last frames say together
    s_t     = [ r_t, z_t ]                             the state
    s_next  = s + B LN(h_L)                            the predictor, of both parts at once
    loss    = mean |s_k - z_(t+k)|^2 on the latents + mean |s_k - sg(r_(t+k))|^2 on the rest,
              k = 1..K, from every K-th frame on

The GRU sees real frames only. Imagination changes its state by actions alone, which is what keeps
an expected view from counting as evidence (as the open-loop network of BYOL-Explore, Guo et al.
2022, arXiv 2206.08332; that such states hold position and heading: Guo et al. 2018, *Neural
predictive belief representations*, arXiv 1811.06407).

Shape legend: B clips, T frames or steps, K steps of a rollout, G rollouts of a clip, D latent
width, R width of the recurrent state, Z = R + D, A action width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.planning.world_model.predictor import Dynamics, LatentPredictor


class RecurrentStates(nn.Module):
    """Maps the latents of clips to states.

    Args:
        latent: D.
        width: R.
    """

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(latent, width, batch_first=True)

    def forward(self, latents_BTD: Tensor) -> Tensor:
        """Returns the state at every frame, given the frames so far, [B, T, Z]."""
        return torch.cat([self.gru(latents_BTD)[0], latents_BTD], dim=-1)

    def last(self, latents_BTD: Tensor) -> Tensor:
        """Returns the state at the last frame, [B, Z].

        First frames that repeat say that nothing was seen before, and are left out.
        """
        B, T, _ = latents_BTD.shape
        same_BT = (latents_BTD[:, 1:] == latents_BTD[:, :1]).all(-1)
        begun_B = same_BT.long().cumprod(1).sum(1)
        times_T, rows_B = (torch.arange(n, device=begun_B.device) for n in (T, B))
        order_BT = (times_T + begun_B[:, None]).clamp(max=T - 1)
        shifted_BTD = latents_BTD[rows_B[:, None], order_BT]
        states_BZ: Tensor = self(shifted_BTD)[rows_B, T - 1 - begun_B]
        return states_BZ


class RecurrentPredictor(Dynamics):
    """Predicts the next state.

    Args:
        latent: D.
        recurrent: R.
        actions: A.
        width: of the predictor.
        depth: number of its blocks.
        steps: K.
    """

    def __init__(
        self, *, latent: int, recurrent: int, actions: int, width: int, depth: int, steps: int
    ) -> None:
        super().__init__()
        self.recurrent, self.steps = recurrent, steps
        self.next = LatentPredictor(
            latent=recurrent + latent, actions=actions, width=width, depth=depth
        )

    def rollout(self, state_BZ: Tensor, actions_BTA: Tensor) -> Tensor:
        """See `Dynamics.rollout`."""
        return self.next.rollout(state_BZ, actions_BTA)

    def errors(self, states_BTZ: Tensor, actions_BTA: Tensor) -> dict[str, Tensor]:
        """See `Dynamics.errors`: the squared errors of the latent and of the recurrent state.

        Steps at the end that are fewer than K are not imagined.
        """
        B, T, Z = states_BTZ.shape
        K = min(self.steps, T - 1)
        G = (T - 1) // K
        actions_MKA = actions_BTA[:, : G * K].reshape(B * G, K, -1)
        starts_MZ = states_BTZ[:, : G * K : K].reshape(B * G, Z)
        future_BSZ = self.rollout(starts_MZ, actions_MKA).view(B, G * K, Z)
        true_BSZ = states_BTZ[:, 1 : G * K + 1]
        R = self.recurrent
        seen_BSD = future_BSZ[..., R:] - true_BSZ[..., R:]
        kept_BSR = future_BSZ[..., :R] - true_BSZ[..., :R].detach()
        return {"prediction": seen_BSD.square().mean(-1), "recurrent": kept_BSR.square().mean(-1)}
