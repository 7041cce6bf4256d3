"""The action-conditioned predictor over patches: a transformer that is causal frame by frame.

    step t      [ action a_t, patches of frame t ]
    attention   every token of step t sees all tokens of the steps up to t
    output      the patches of step t say what frame t + 1 holds: z_t + change
    loss        mean |P(z_0..t, a_0..t) - z_(t+1)|                        every next frame
                + mean |P(P(.. z_0 ..)) - z_k|, k = 1..K                  K steps from the first one

After V-JEPA 2-AC (Assran et al. 2025, arXiv 2506.09985, section 3): both losses are absolute
errors, and K is 2 there. Differences: games give no proprioception, so there are no state tokens;
positions are a fixed sine-cosine table that is added; the output is a change that starts at zero;
and the encoder may train along, where theirs is frozen.

Frames are numbered within the context, which slides along: what lies further back than `context`
frames is forgotten.

Shape legend: B clips, T frames or steps, N patches, L latent width of a patch, D = N * L, A action
width, P predictor width, K tokens of a sequence, T * (1 + N).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.encoders.blocks import LN_EPS, init_weights, transformer_blocks
from models.encoders.positions import sincos_3d
from models.image_size import Grid
from models.planning.world_model.predictor import Dynamics

HEAD = 32
"""Width of an attention head."""


class BlockCausalPredictor(Dynamics):
    """Predicts the patches of the next frame from those of all frames before it.

    Args:
        grid: the patches of a frame.
        latent: L.
        actions: A.
        width: P, a multiple of `HEAD`.
        depth: number of blocks.
        context: most frames that are seen.
        steps: K, steps of the second loss.

    Raises:
        ValueError: the width is not such a multiple.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        latent: int,
        actions: int,
        width: int,
        depth: int,
        context: int,
        steps: int,
    ) -> None:
        super().__init__()
        if width % HEAD:
            raise ValueError(f"--objective.dynamics-width: needs a multiple of {HEAD}, got {width}")
        self.patches, self.context, self.steps = grid.tokens, context, steps
        self.embed_patch = nn.Linear(latent, width)
        self.embed_action = nn.Linear(actions, width)
        self.blocks = transformer_blocks(width, depth, width // HEAD, 4.0)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.change = nn.Linear(width, latent)
        init_weights(self, "fan_in")
        nn.init.zeros_(self.change.weight)
        places_KP = sincos_3d(width, Grid(grid.rows, grid.columns, context))
        self.places_TNP: Tensor
        self.seen_KK: Tensor
        self.register_buffer(
            "places_TNP", places_KP.view(context, grid.tokens, width), persistent=False
        )
        self.register_buffer("seen_KK", causal_by_block(context, 1 + grid.tokens), persistent=False)

    def forward(self, latents_BTD: Tensor, actions_BTA: Tensor) -> Tensor:
        """Predicts the frame after each of at most `context` frames, [B, T, D].

        Args:
            latents_BTD: of the frames.
            actions_BTA: what was done at each of them.
        """
        B, T, _ = latents_BTD.shape
        patches_BTNL = latents_BTD.view(B, T, self.patches, -1)
        patches_BTNP = self.embed_patch(patches_BTNL) + self.places_TNP[:T]
        # An action stands at the mean place of its frame, which says when it was.
        actions_BT1P = (self.embed_action(actions_BTA) + self.places_TNP[:T].mean(1))[:, :, None]
        tokens_BKP = torch.cat([actions_BT1P, patches_BTNP], dim=2).flatten(1, 2)
        K = tokens_BKP.shape[1]
        for block in self.blocks:
            tokens_BKP = block(tokens_BKP, self.seen_KK[:K, :K])
        found_BTNP = self.norm(tokens_BKP).view(B, T, 1 + self.patches, -1)[:, :, 1:]
        predicted_BTD: Tensor = latents_BTD + self.change(found_BTNP).flatten(2)
        return predicted_BTD

    def rollout(self, state_BZ: Tensor, actions_BTA: Tensor) -> Tensor:
        """See `Dynamics.rollout`; a state is the latents of one frame."""
        frames = [state_BZ]
        for step in range(actions_BTA.shape[1]):
            first = max(0, step + 1 - self.context)
            context_BTD = torch.stack(frames[first:], dim=1)
            frames.append(self(context_BTD, actions_BTA[:, first : step + 1])[:, -1])
        return torch.stack(frames[1:], dim=1)

    def errors(self, states_BTZ: Tensor, actions_BTA: Tensor) -> dict[str, Tensor]:
        """See `Dynamics.errors`: the absolute error with the true past, and with the imagined."""
        next_BTD = self(states_BTZ[:, :-1], actions_BTA)
        future_BKD = self.rollout(states_BTZ[:, 0], actions_BTA[:, : self.steps])
        true_BKD = states_BTZ[:, 1 : 1 + future_BKD.shape[1]]
        return {
            "prediction": (next_BTD - states_BTZ[:, 1:]).abs().mean(-1),
            "rollout": (future_BKD - true_BKD).abs().mean(-1),
        }


def causal_by_block(steps: int, tokens: int) -> Tensor:
    """Returns which tokens (columns) a token (row) sees: those of its own step and before.

    Args:
        steps: steps of the sequence.
        tokens: tokens of a step.
    """
    step_K = torch.arange(steps).repeat_interleave(tokens)
    return step_K[:, None] >= step_K[None]
