"""What a world model imagines of a game, beside controls: errors after some steps, open loop.

Shape suffixes: T frames of a walk, N rows, C clips, S steps, Z width of a state, P places, A
buttons, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.planning.world_model.world_model import WorldModel
from pipelines.evaluation.ranks import effective_rank
from pipelines.fetchers.games.engine import U8
from pipelines.planning.games.readout import PlaceReadout
from pipelines.planning.games.walks import Walk
from pipelines.planning.games.worlds import F32, GameWorld
from pipelines.planning.results import interval

STEPS = (1, 5, 10)
"""Numbers of steps after which errors are told."""
EVERY = 8
"""Steps between the beginnings of the clips of a walk."""


def stacked(frames_THW3: U8, history: int) -> Tensor:
    """Returns every frame with those before it, as `WorldModel.encode` takes them.

    Before a walk's first frame nothing moved.

    Returns:
        uint8 [T, history * 3, H, W].
    """
    frames = torch.from_numpy(frames_THW3).permute(0, 3, 1, 2)
    ages = torch.arange(history - 1, -1, -1)
    which = (torch.arange(len(frames))[:, None] - ages).clamp(min=0)
    return frames[which].flatten(1, 2)


@torch.no_grad()
def encode_walk(model: WorldModel, walk: Walk) -> Tensor:
    """Returns the states of a walk's frames, [T, Z]."""
    return model.walk(stacked(walk.frames_THW3, 1))


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Pieces of walks: a state, what was pressed then, and the places that it led to."""

    walk_C: list[int]
    """The walk of each."""
    states_CSZ: Tensor
    """From the first frame on, S = 1 + the most steps."""
    actions_CSA: Tensor
    places_CSP: F32


def clips_of(states: Sequence[Tensor], walks: Sequence[Walk]) -> Clips:
    """Cuts walks that are long enough into clips."""
    length = max(STEPS) + 1
    cut = [
        (number, first)
        for number, walk in enumerate(walks)
        for first in range(0, len(walk.actions_TA) - length + 1, EVERY)
    ]
    return Clips(
        walk_C=[number for number, _ in cut],
        states_CSZ=torch.stack([states[n][t : t + length] for n, t in cut]),
        actions_CSA=torch.from_numpy(
            np.stack([walks[n].actions_TA[t : t + length - 1] for n, t in cut])
        ),
        places_CSP=np.stack([walks[n].places_TP[t : t + length] for n, t in cut]),
    )


@torch.no_grad()
def open_loop(
    world: GameWorld, model: WorldModel, readout: PlaceReadout, clips: Clips
) -> dict[str, Any]:
    """Measures the errors of imagined places after some steps of walks that nothing was fitted on.

    Beside the model stand imagining with another clip's actions (`shuffled`), the readout of the
    clip's first frame (`copy_last`), its true place (`copy_true`), and the readout of the frame
    that came (`seen`), which no imagination can be expected to beat.

    Returns:
        By quantity: the errors by row and number of steps, with 95% intervals by resampling walks;
        and `gain`, how much less the model errs than copy_last, paired.
    """
    start_CZ = clips.states_CSZ[:, 0]
    other_CSA = clips.actions_CSA.roll(len(start_CZ) // 2, 0)
    seen_CSP = readout(clips.states_CSZ).numpy()
    found = {
        "model": readout(model.rollout(start_CZ, clips.actions_CSA).mean(0)).numpy(),
        "shuffled": readout(model.rollout(start_CZ, other_CSA).mean(0)).numpy(),
        "copy_last": np.broadcast_to(seen_CSP[:, :1], seen_CSP[:, 1:].shape),
        "copy_true": np.broadcast_to(clips.places_CSP[:, :1], seen_CSP[:, 1:].shape),
        "seen": seen_CSP[:, 1:],
    }
    true_CSP = clips.places_CSP[:, 1:]
    results: dict[str, Any] = {}
    for quantity in world.quantities:
        errors = {name: quantity.error(of_CSP, true_CSP) for name, of_CSP in found.items()}
        errors["gain"] = errors["copy_last"] - errors["model"]
        results[quantity.name] = {"unit": quantity.unit} | {
            name: {str(step): _mean(of_CS[:, step - 1], clips.walk_C) for step in STEPS}
            for name, of_CS in errors.items()
        }
    flat_NZ = clips.states_CSZ.flatten(0, 1)
    singular_Z = torch.linalg.svdvals(flat_NZ - flat_NZ.mean(0))
    return {"open_loop": results, "effective_rank": effective_rank(singular_Z)}


def _mean(errors_C: F32, walk_C: Sequence[int]) -> dict[str, Any]:
    """Returns the mean over walks of their own means, and its interval; NaN does not count."""
    walks = [errors_C[np.array(walk_C) == walk] for walk in sorted(set(walk_C))]
    means = np.array([w[~np.isnan(w)].mean() for w in walks if not np.isnan(w).all()])
    return {"mean": float(means.mean()), "interval": interval(means), "walks": len(means)}
