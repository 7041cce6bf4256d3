"""What a world model's imagination is worth: its error in pixels after some steps, open loop.

Shape suffixes: N frames, B walks, T steps, D latent width, 2 = (x, y) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.planning.agent import Model
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.evaluation.ranks import effective_rank

STEPS = (1, 5, 10, 20)
"""Numbers of steps after which the error is told."""
WALKS = 300
"""Walks that nothing was trained on."""


@torch.no_grad()
def open_loop(
    model: Model, readout: Callable[[Tensor], Tensor], world: TwoRooms, seed: int
) -> dict[str, object]:
    """Measures the mean error of imagined places after some steps, in pixels.

    Beside it stand the error of saying that nothing moves (`copy_last`), of imagining with another
    walk's actions (`shuffled`), of reading places off real frames (`probe`), and the effective rank
    of the latents.
    """
    generator = torch.Generator().manual_seed(seed)
    places_BT2, actions_BT2 = world.random_walk(WALKS, max(STEPS), generator)
    latents_BTD = encode_walks(model, world, places_BT2)
    imagined = {
        "model": readout(model.rollout(latents_BTD[:, 0], actions_BT2).mean(0)),
        "shuffled": readout(model.rollout(latents_BTD[:, 0], actions_BT2.roll(1, 0)).mean(0)),
        "copy_last": places_BT2[:, :1].expand_as(places_BT2[:, 1:]),
    }
    errors = {
        name: {
            str(step): float((found_BT2[:, step - 1] - places_BT2[:, step]).norm(dim=-1).mean())
            for step in STEPS
        }
        for name, found_BT2 in imagined.items()
    }
    flat_ND = latents_BTD.flatten(0, 1)
    singular_D = torch.linalg.svdvals(flat_ND - flat_ND.mean(0))
    probe = (readout(latents_BTD) - places_BT2).norm(dim=-1).mean()
    return {
        "open_loop_px": errors,
        "probe_px": float(probe),
        "effective_rank": effective_rank(singular_D),
    }


@torch.no_grad()
def encode_walks(model: Model, world: TwoRooms, places_BT2: Tensor) -> Tensor:
    """Returns the latents of all frames of walks, [B, T, D]."""
    return torch.stack([model.encode(world.render(places_T2)) for places_T2 in places_BT2])
