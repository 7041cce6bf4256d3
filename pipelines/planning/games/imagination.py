"""What a world model imagines of a game, beside controls: errors after some steps, open loop.

Shape suffixes: T frames of a walk, N rows, C clips, S steps, Z width of a state, P places, A
buttons, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.planning.world_model.world_model import WorldModel
from pipelines.evaluation.ranks import effective_rank
from pipelines.fetchers.games.engine import U8
from pipelines.planning.games.readout import STEPS as STEPS_OF_FIT
from pipelines.planning.games.readout import PlaceReadout, fit_readout
from pipelines.planning.games.walks import Walk
from pipelines.planning.games.worlds import F32, GameWorld
from pipelines.planning.results import interval

ENCODED = 256
"""Clips that are imagined at a time."""
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
    frames = torch.tensor(frames_THW3).permute(0, 3, 1, 2)  # a copy: those of Ray cannot be written
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
def imagined(model: WorldModel, clips: Clips, actions_CSA: Tensor | None = None) -> Tensor:
    """Returns the states that a model imagines of clips after each step, [C, S, Z].

    Args:
        model: the model.
        clips: where imagination starts.
        actions_CSA: what is done; None for what was done in the clips.
    """
    actions_CSA = clips.actions_CSA if actions_CSA is None else actions_CSA
    return torch.cat(
        [
            model.rollout(clips.states_CSZ[part, 0], actions_CSA[part]).mean(0)
            for part in torch.split(torch.arange(len(clips.walk_C)), ENCODED)
        ]
    )


def read_places(
    model: WorldModel, states: Sequence[Tensor], walks: Sequence[Walk], steps: int = STEPS_OF_FIT
) -> PlaceReadout:
    """Fits a readout of places to the states of walks, and to what is imagined of them."""
    clips = clips_of(states, walks)
    seen = [walk.places_TP for walk in walks]
    return fit_readout(
        [*states, *imagined(model, clips)], [*seen, *clips.places_CSP[:, 1:]], steps=steps
    )


def read_changes(
    world: GameWorld, model: WorldModel, clips: Clips, steps: int = STEPS_OF_FIT
) -> PlaceReadout:
    """Fits a readout of what has changed since the first state, imagined or seen."""
    changes_CSP = world.changes(clips.places_CSP[:, 1:], clips.places_CSP[:, :1])
    after = [imagined(model, clips), clips.states_CSZ[:, 1:]]
    pairs = [pair for states_CSZ in after for pair in _pairs(clips, states_CSZ)]
    return fit_readout(pairs, [*changes_CSP, *changes_CSP], steps=steps)


@torch.no_grad()
def open_loop(
    world: GameWorld,
    model: WorldModel,
    places: Callable[[Tensor], Tensor],
    changes: Callable[[Tensor], Tensor],
    clips: Clips,
) -> dict[str, Any]:
    """Measures what is imagined after some steps of walks that nothing was fitted on.

    Beside the model stand imagining with another clip's actions (`shuffled`), the readout of the
    clip's first frame (`copy_last`), its true place (`copy_true`), and the readout of the frame
    that came (`seen`). `composed` is copy_last, moved by what is read of the imagined change. Of
    changes there is no copy_last: `copy_true` says that nothing changes.

    Args:
        world: what is read.
        model: what imagines.
        places: reads places off states.
        changes: reads what has changed off two states side by side.
        clips: the walks.

    Returns:
        `open_loop` and `changes`, by quantity: the errors by row and number of steps, with 95%
        intervals by resampling walks; and `gain`, how much less the model errs than copy_last,
        of changes than copy_true, paired, and `gain_composed` of the row composed.
    """
    other_CSA = clips.actions_CSA.roll(len(clips.walk_C) // 2, 0)
    after = {
        "model": imagined(model, clips),
        "shuffled": imagined(model, clips, other_CSA),
        "seen": clips.states_CSZ[:, 1:],
    }
    true_CSP, first_CSP = clips.places_CSP[:, 1:], clips.places_CSP[:, :1]
    shape = true_CSP.shape
    found = {name: places(states_CSZ).numpy() for name, states_CSZ in after.items()}
    found["copy_last"] = np.broadcast_to(places(clips.states_CSZ[:, :1]).numpy(), shape)
    found["copy_true"] = np.broadcast_to(first_CSP, shape)
    moved = {name: changes(_pairs(clips, states)).numpy() for name, states in after.items()}
    moved["copy_true"] = np.broadcast_to(world.changes(first_CSP, first_CSP), shape)
    found["composed"] = world.changed(found["copy_last"], moved["model"])
    flat_NZ = clips.states_CSZ.flatten(0, 1)
    singular_Z = torch.linalg.svdvals(flat_NZ - flat_NZ.mean(0))
    true_moved_CSP = world.changes(true_CSP, first_CSP)
    return {
        "open_loop": _told(world, found, true_CSP, clips.walk_C, "copy_last"),
        "changes": _told(world, moved, true_moved_CSP, clips.walk_C, "copy_true"),
        "effective_rank": effective_rank(singular_Z),
    }


def _pairs(clips: Clips, states_CSZ: Tensor) -> Tensor:
    """Returns first states and later ones side by side."""
    return torch.cat([clips.states_CSZ[:, :1].expand_as(states_CSZ), states_CSZ], dim=-1)


def _told(
    world: GameWorld, found: dict[str, F32], true_CSP: F32, walk_C: Sequence[int], base: str
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for quantity in world.quantities:
        errors = {name: quantity.error(of_CSP, true_CSP) for name, of_CSP in found.items()}
        errors["gain"] = errors[base] - errors["model"]
        if "composed" in errors:
            errors["gain_composed"] = errors[base] - errors["composed"]
        results[quantity.name] = {"unit": quantity.unit} | {
            name: {str(step): _mean(of_CS[:, step - 1], walk_C) for step in STEPS}
            for name, of_CS in errors.items()
        }
    return results


def _mean(errors_C: F32, walk_C: Sequence[int]) -> dict[str, Any]:
    """Returns the mean over walks of their own means, and its interval; NaN does not count."""
    walks = [errors_C[np.array(walk_C) == walk] for walk in sorted(set(walk_C))]
    means = np.array([w[~np.isnan(w)].mean() for w in walks if not np.isnan(w).all()])
    return {"mean": float(means.mean()), "interval": interval(means), "walks": len(means)}
