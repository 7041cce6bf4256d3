"""Goes on training a world model's predictors on the latents of walks, its perception as it is.

Frames are encoded once, so a step costs no perception: that of V-JEPA 2-AC is frozen too (Assran et
al. 2025, arXiv 2506.09985, section 3). The loss is that of training (`Dynamics.errors`).

Shape suffixes: N frames of a walk, C clips, B clips of a batch, T frames of a clip, Z width of a
state, A buttons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from models.planning.descent import descend
from models.planning.world_model.block_causal import BlockCausalPredictor
from models.planning.world_model.predictor import Dynamics
from models.planning.world_model.world_model import WorldModel
from pipelines.planning.games.walks import Walk

FRAMES = 11
"""T, or fewer where a predictor sees fewer; as many steps are imagined as are measured."""
BATCH = 64
"""B."""
LR = 1e-3
"""Peak learning rate of AdamW; it falls along a half cosine."""


def tuned(
    model: WorldModel, states: Sequence[Tensor], walks: Sequence[Walk], steps: int, seed: int
) -> WorldModel:
    """Returns a copy of the model whose predictors have learned on for some steps.

    Args:
        model: the model.
        states: of the walks' frames, as `imagination.encode_walk` returns them.
        walks: what was pressed.
        steps: optimizer steps; 0 returns the model as it is.
        seed: of the batches.
    """
    if not steps:
        return model
    found = copy.deepcopy(model)
    found.predictors.requires_grad_(True)
    members = [cast(Dynamics, one) for one in found.predictors]
    seen = [one.context for one in members if isinstance(one, BlockCausalPredictor)]
    frames = min([FRAMES, *(context + 1 for context in seen)])
    states_CTZ, actions_CTA = _clips(states, walks, frames)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        drawn_B = torch.randint(len(states_CTZ), (BATCH,), generator=generator)
        errors = [one.errors(states_CTZ[drawn_B], actions_CTA[drawn_B]) for one in members]
        return torch.stack([part.mean() for one in errors for part in one.values()]).sum()

    for _ in descend(found.predictors.parameters(), loss, steps=steps, lr=LR):
        pass
    return found.eval().requires_grad_(False)


def _clips(states: Sequence[Tensor], walks: Sequence[Walk], frames: int) -> tuple[Tensor, Tensor]:
    """Returns all clips of the walks: states [C, T, Z] and actions [C, T - 1, A]."""
    found, actions = [], []
    for states_NZ, walk in zip(states, walks, strict=True):
        if len(states_NZ) >= frames:
            found.append(states_NZ.unfold(0, frames, 1).mT)
            pressed_NA = torch.from_numpy(walk.actions_TA)
            actions.append(pressed_NA.unfold(0, frames, 1).mT[:, :-1])
    return torch.cat(found), torch.cat(actions)
