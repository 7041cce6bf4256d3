"""Fits on random walks what planning needs beside a world model: critic, distance and readout.

Shape suffixes: B walks, T steps, D latent width, A action width, 2 = (x, y) in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from models.planning.agent import Model
from models.planning.costs.critic import CriticTraining, train_critic
from models.planning.costs.slow_distance import SlowDistance
from models.planning.descent import descend
from models.planning.memory import Memory
from models.planning.world_model.predictor import LatentPredictor
from models.planning.world_model.readout import Readout
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.planning.imagination import encode_walks
from pipelines.planning.rows import Fitted

WINDOW, BATCH, LR = 9, 32, 2e-3
"""Frames of a clip, clips of a step and peak learning rate of `unperceived`, as in the recipe."""


def fit(model: Model, places_BT2: Tensor, critic_steps: int, generator: torch.Generator) -> Fitted:
    """Fits critic, distance and readout of places.

    Args:
        model: encodes the frames of the walks.
        places_BT2: the walks.
        critic_steps: optimizer steps of the critic; 0 for none.
        generator: of the critic's goals and pairs.
    """
    latents_BTD = encode_walks(model, TwoRooms(), places_BT2)
    critic = None
    if critic_steps:
        memory = Memory(latents_BTD[:, 1:].flatten(0, 1).shape[0])
        memory.write(latents_BTD[:, :-1].flatten(0, 1), following=latents_BTD[:, 1:].flatten(0, 1))
        critic, _ = train_critic(memory, CriticTraining(steps=critic_steps), generator)
    return Fitted(
        model=model,
        critic=critic,
        distance=SlowDistance.fit(latents_BTD),
        readout=Readout.fit(latents_BTD.flatten(0, 1), places_BT2.flatten(0, 1)),
    )


def check_ablations(model: WorldModel, flag: str) -> None:
    """Checks that everything but perception can be fitted anew for a model (`unperceived`).

    Raises:
        ValueError: its states are more than one latent.
    """
    if model.history > 1 or model.perception.grid.tokens > 1:
        raise ValueError(
            f"{flag}: the row no_perception needs a state of one latent.\n"
            "Train with --objective.predictor pooled and --objective.history 1, or leave it out."
        )


def unperceived(
    fresh: WorldModel,
    places_BT2: Tensor,
    actions_BTA: Tensor,
    *,
    steps: int,
    critic_steps: int,
    generator: torch.Generator,
) -> Fitted:
    """Fits everything but perception, on latents of fresh weights.

    The latents are scaled to variance 1, so that what fails is what they tell and not their size.

    Args:
        fresh: a world model of fresh weights; a copy is trained.
        places_BT2: the walks.
        actions_BTA: the actions between their frames.
        steps: optimizer steps of the predictors.
        critic_steps: those of the critic.
        generator: of everything random.
    """
    model = copy.deepcopy(fresh)
    latents_BTD = encode_walks(model, TwoRooms(), places_BT2)
    layers = cast(torch.nn.Module, model.perception.mixed).modules()
    mixed = [layer for layer in layers if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        deviation_D, mean_D = torch.std_mean(latents_BTD, dim=(0, 1))
        mixed.weight.div_(deviation_D[:, None])
        mixed.bias.sub_(mean_D).div_(deviation_D)
    _train_predictors(model, (latents_BTD - mean_D) / deviation_D, actions_BTA, steps, generator)
    model.eval().requires_grad_(False)
    return fit(model, places_BT2, critic_steps, generator)


def _train_predictors(
    model: WorldModel,
    latents_BTD: Tensor,
    actions_BTA: Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    members = cast(Sequence[LatentPredictor], model.predictors).requires_grad_(True)  # type: ignore[attr-defined]
    walks, length = latents_BTD.shape[:2]

    def loss() -> Tensor:
        which_B = torch.randint(walks, (BATCH,), generator=generator)
        first = int(torch.randint(length + 1 - WINDOW, (), generator=generator))
        clip_BTD = latents_BTD[which_B, first : first + WINDOW]
        between_BTA = actions_BTA[which_B, first : first + WINDOW - 1]
        return (model.rollout(clip_BTD[:, 0], between_BTA) - clip_BTD[:, 1:]).square().mean()

    for _ in descend(members.parameters(), loss, steps=steps, lr=LR, max_norm=2.0):
        pass
