"""Goes on training what is behind a world model's perception on the latents of walks.

Frames are encoded once, so a step costs no perception: that of V-JEPA 2-AC is frozen too (Assran et
al. 2025, arXiv 2506.09985, section 3). The loss is that of training (`Dynamics.errors`). A model
without recurrent states can be given some first.

Shape suffixes: N frames of a walk, C clips, B clips of a batch, T frames of a clip, Z width of a
state, D that of a frame's latents, A buttons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from models.planning.descent import descend
from models.planning.world_model.block_causal import BlockCausalPredictor
from models.planning.world_model.predictor import Dynamics
from models.planning.world_model.world_model import WorldModel
from pipelines.config.train import PretrainConfig
from pipelines.planning.games.walks import Walk
from pipelines.planning.loading import frozen
from pipelines.runs.checkpoints import new_objective

FRAMES, HISTORY = 11, 24
"""T: as many steps are imagined as are measured; with recurrent states one frame more than they are
made of; and fewer where a predictor sees fewer."""
ROLLOUT_STEPS = 8
"""Steps that are imagined from a recurrent state."""
BATCH = 32
"""B."""
LR, MAX_NORM = 2e-3, 2.0
"""Peak learning rate of AdamW, which falls along a half cosine, and the norm of its gradients."""


def with_recurrent_states(
    model: WorldModel, run: PretrainConfig, width: int
) -> tuple[WorldModel, PretrainConfig]:
    """Returns a model with the same perception and fresh recurrent states, and its configuration.

    Args:
        model: a trained one.
        run: its configuration.
        width: of the recurrent network's state.

    Raises:
        ValueError: the predictor is one that has no recurrent states.
    """
    objective = replace(
        run.objective,
        recurrent_width=width,
        window=HISTORY + 1,
        history=HISTORY,
        rollout_steps=ROLLOUT_STEPS,
    )
    changed = replace(run, objective=objective)
    found = frozen(new_objective(changed))
    found.perception.load_state_dict(model.perception.state_dict())
    return found, changed


def tuned(
    model: WorldModel, states: Sequence[Tensor], walks: Sequence[Walk], steps: int, seed: int
) -> WorldModel:
    """Returns a copy of the model whose predictors, and recurrent network, have learned on.

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
    learning = [found.predictors, *([found.recurrent] if found.recurrent else [])]
    trained = [weight for part in learning for weight in part.requires_grad_(True).parameters()]
    latents_CTD, actions_CTA = _clips(found, states, walks)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        drawn_B = torch.randint(len(latents_CTD), (BATCH,), generator=generator)
        states_BTZ = found.states(latents_CTD[drawn_B])
        actions_BTA = actions_CTA[drawn_B][:, 1 - states_BTZ.shape[1] :]
        errors = [cast(Dynamics, one).errors(states_BTZ, actions_BTA) for one in found.predictors]
        return torch.stack([part.mean() for one in errors for part in one.values()]).sum()

    for _ in descend(trained, loss, steps=steps, lr=LR, max_norm=MAX_NORM):
        pass
    return found.eval().requires_grad_(False)


@torch.no_grad()
def restated(model: WorldModel, states_NZ: Tensor) -> Tensor:
    """Returns a walk's states again, whose latents stay, once the recurrent network has changed."""
    if model.recurrent is None:
        return states_NZ
    return model.states(model.newest(states_NZ)[None])[0]


def _clips(
    model: WorldModel, states: Sequence[Tensor], walks: Sequence[Walk]
) -> tuple[Tensor, Tensor]:
    """Returns all clips of the walks: latents [C, T, D] and actions [C, T - 1, A]."""
    seen = [one.context + 1 for one in model.predictors if isinstance(one, BlockCausalPredictor)]
    frames = min([HISTORY + 1 if model.recurrent else FRAMES, *seen])
    latents, actions = [], []
    for states_NZ, walk in zip(states, walks, strict=True):
        if len(states_NZ) >= frames:
            latents.append(model.newest(states_NZ).unfold(0, frames, 1).mT)
            pressed_NA = torch.tensor(walk.actions_TA)
            actions.append(pressed_NA.unfold(0, frames, 1).mT[:, :-1])
    return torch.cat(latents), torch.cat(actions)
