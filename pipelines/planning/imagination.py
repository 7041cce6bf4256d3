"""What a world model's imagination is worth: its error in pixels after some steps, open loop.

Shape suffixes: N frames, B walks, T steps, D latent width, 2 = (x, y) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.planning.agent import Model
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.evaluation.ranks import effective_rank

STEPS = (1, 5, 10, 20)
"""Numbers of steps after which the error is told."""
WALKS = 300
"""Walks that nothing was trained on."""
RIDGE = 1e-3
"""Weight of the readout's ridge, times the number of frames."""


@dataclass(frozen=True, kw_only=True)
class Readout:
    """A linear map from latents to places, fitted by ridge regression."""

    weight_D2: Tensor
    """The last row is the constant."""

    @classmethod
    def fit(cls, latents_ND: Tensor, places_N2: Tensor) -> Readout:
        """Fits the map."""
        rows_ND = _with_one(latents_ND).double()
        unit_DD = torch.eye(rows_ND.shape[1], dtype=torch.float64)
        gram_DD = rows_ND.T @ rows_ND + RIDGE * len(rows_ND) * unit_DD
        solved_D2 = torch.linalg.solve(gram_DD, rows_ND.T @ places_N2.double())
        return cls(weight_D2=solved_D2.float())

    def __call__(self, latents: Tensor) -> Tensor:
        """Reads places: [..., D] to [..., 2]."""
        places: Tensor = _with_one(latents) @ self.weight_D2
        return places


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


@torch.no_grad()
def open_loop(model: Model, readout: Readout, world: TwoRooms, seed: int) -> dict[str, object]:
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
