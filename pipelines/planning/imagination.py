"""What a world model's imagination is worth: its error in pixels after some steps, open loop.

Shape suffixes: N frames, B walks, T steps, D latent width, 2 = (x, y) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from scipy import stats
from torch import Tensor

from models.planning.agent import Model
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.evaluation.ranks import effective_rank

Distance = Callable[[Tensor, Tensor], Tensor]
"""Maps two latents [B, D] to what lies between them, [B]."""
STEPS = (1, 5, 10, 20)
"""Numbers of steps after which the error is told."""
WALKS = 300
"""Walks that nothing was trained on."""
PAIRS = 2000
"""Pairs of places whose distances are compared with the way."""
FAR = 12.0
"""Pixels of way from which two places are far apart."""


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
def disagreement(model: Model, world: TwoRooms, seed: int) -> dict[str, dict[str, float]]:
    """Measures whether an ensemble knows where it errs, on walks that nothing was fitted on.

    Errors are those of the mean predictor's latents. The quarter of the walks with the greatest is
    told from the quarter with the least by the disagreement of the predictors and, beside it, by
    how far the latents have been imagined to move, which needs no ensemble.

    Returns:
        By number of steps both AUROCs (`disagreement`, `moved`); nothing of a single predictor.
    """
    generator = torch.Generator().manual_seed(seed)
    places_BT2, actions_BT2 = world.random_walk(WALKS, max(STEPS), generator)
    latents_BTD = encode_walks(model, world, places_BT2)
    imagined_EBTD = model.rollout(latents_BTD[:, 0], actions_BT2)
    if len(imagined_EBTD) == 1:
        return {}
    mean_BTD = imagined_EBTD.mean(0)
    error_BT = (mean_BTD - latents_BTD[:, 1:]).norm(dim=-1)
    apart_BT = imagined_EBTD.var(0, unbiased=False).mean(-1).sqrt()
    moved_BT = (mean_BTD - latents_BTD[:, :1]).norm(dim=-1)
    return {
        str(step): {
            "disagreement": _tells(apart_BT[:, step - 1], error_BT[:, step - 1]),
            "moved": _tells(moved_BT[:, step - 1], error_BT[:, step - 1]),
        }
        for step in STEPS
    }


def _tells(score_B: Tensor, error_B: Tensor) -> float:
    """Returns the chance that a score is higher for a great error than for a small one."""
    quarter = len(error_B) // 4
    ordered_B = error_B.argsort()
    small_B, great_B = score_B[ordered_B[:quarter]], score_B[ordered_B[-quarter:]]
    above = stats.mannwhitneyu(great_B.numpy(), small_B.numpy()).statistic
    return float(above / quarter**2)


@torch.no_grad()
def encode_walks(model: Model, world: TwoRooms, places_BT2: Tensor) -> Tensor:
    """Returns the latents of all frames of walks, [B, T, D]."""
    return torch.stack([model.encode(world.render(places_T2)) for places_T2 in places_BT2])


@torch.no_grad()
def follows_the_way(
    model: Model, distances: Mapping[str, Distance], world: TwoRooms, seed: int
) -> dict[str, dict[str, float]]:
    """Measures the rank correlation of distances between latents with the length of the way.

    Args:
        model: encodes the frames of random pairs of places.
        distances: map two latents [B, D] to what lies between them [B], by name.
        world: the way goes straight, or through the middle of the door.
        seed: of the places.

    Returns:
        By name, of all pairs (`all`) and of those that are far apart (`far`).
    """
    generator = torch.Generator().manual_seed(seed)
    places_B2, goals_B2 = (world.sample_places(PAIRS, generator) for _ in range(2))
    way_B = world.way_length(places_B2, goals_B2)
    latents_BD, aims_BD = (model.encode(world.render(at_B2)) for at_B2 in (places_B2, goals_B2))
    found = {name: distance(latents_BD, aims_BD) for name, distance in distances.items()}
    far_B = way_B > FAR
    return {
        name: {"all": _alike(of_B, way_B), "far": _alike(of_B[far_B], way_B[far_B])}
        for name, of_B in found.items()
    }


def _alike(first_B: Tensor, second_B: Tensor) -> float:
    """Returns the rank correlation."""
    return float(stats.spearmanr(first_B.numpy(), second_B.numpy()).statistic)
