"""What a world model imagines, drawn beside what really happened.

Shape suffixes: B clips, C channels, T frames, H and W pixels, A action width, D width of a frame's
latents, h frames of the model's history, Z width of a state, K = T - h imagined steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.beliefs.latent_decoder import LatentDecoder, latent_loss
from models.beliefs.pixels import to_bytes, to_values
from models.beliefs.retrieval import chance, mean_reciprocal_rank
from models.planning.descent import descend
from models.planning.world_model.world_model import WorldModel
from pipelines.evaluation.beliefs.panels import Panel

BATCH, LR, SHOWN, FRAMES = 64, 1e-3, 4, 13
"""Frames of a batch, the learning rate, clips that are drawn, and their frames at most."""


@dataclass(frozen=True)
class Rollouts:
    """What was found."""

    results: dict[str, Any]
    """`mrr` by row and number of steps, and counts."""
    panels: list[Panel]
    """Real, imagined and controls."""
    decoder: LatentDecoder


def rollout_study(
    model: WorldModel,
    train: Tensor,
    test: Tensor,
    actions_BTA: Tensor,
    *,
    steps: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Rollouts:
    """Trains a decoder of latents, and looks for what is imagined among all real frames.

    Args:
        model: a trained one.
        train: clips uint8 [B, C, T, H, W] whose frames the decoder learns from.
        test: clips to imagine, each from its first h frames.
        actions_BTA: what was done between their frames, [B, T - 1, A].
        steps: optimizer steps of the decoder.
        seed: of its weights and batches.
        advance: is called after each step.
    """
    decoder = _fit(model, _frames(train), steps, seed, advance)
    real_BTZ, actions_BKA = _states(model, test), actions_BTA[:, model.history - 1 :]
    with torch.no_grad():
        told = {
            "real": real_BTZ[:, 1:],
            "imagined": model.rollout(real_BTZ[:, 0], actions_BKA).mean(0),
            "shuffled": model.rollout(real_BTZ[:, 0], actions_BKA.roll(1, 0)).mean(0),
            "copy": real_BTZ[:, :1].expand_as(real_BTZ[:, 1:]),
        }
        drawn = {name: _drawn(decoder, model.newest(states)) for name, states in told.items()}
    real_BTD = model.newest(real_BTZ)
    count = actions_BKA.shape[1]
    asked = sorted({k for k in (1, 2, 5, 10, count) if k <= count})
    mrr = {
        name: {str(k): _found(model, clips[:, :, k - 1], real_BTD[:, k]) for k in asked}
        for name, clips in drawn.items()
    }
    results = {"mrr": mrr, "chance": chance(len(test)), "samples": len(test), "steps": steps}
    shown = {"what happened": test[:, :, -count:]} | {
        title: drawn[name]
        for name, title in (
            ("real", "real latents"),
            ("imagined", "imagined"),
            ("shuffled", "other actions"),
        )
    }
    panels = [Panel(title, clips[:SHOWN]) for title, clips in shown.items()]
    return Rollouts(results, panels, decoder)


def _frames(clips_BCTHW: Tensor) -> Tensor:
    return clips_BCTHW.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def _states(model: WorldModel, clips_BCTHW: Tensor) -> Tensor:
    """Returns the state at every frame that has a history, [B, K + 1, Z]."""
    B, _, T, _, _ = clips_BCTHW.shape
    states, frames_BTCHW = T + 1 - model.history, clips_BCTHW.transpose(1, 2)
    pasts = [frames_BTCHW[:, first : first + states] for first in range(model.history)]
    parts = torch.split(torch.cat(pasts, dim=2).flatten(0, 1), 512)
    return torch.cat([model.encode(part) for part in parts]).reshape(B, states, -1)


def _drawn(decoder: LatentDecoder, latents_BKD: Tensor) -> Tensor:
    """Returns clips uint8 [B, C, K, H, W]."""
    parts = [to_bytes(decoder(part)) for part in torch.split(latents_BKD.flatten(0, 1), 512)]
    frames = torch.cat(parts)
    return frames.reshape(*latents_BKD.shape[:2], *frames.shape[1:]).transpose(1, 2)


@torch.no_grad()
def _found(model: WorldModel, frames_BCHW: Tensor, real_BD: Tensor) -> float:
    return mean_reciprocal_rank(model.newest(model.encode(frames_BCHW)), real_BD)


def _fit(
    model: WorldModel,
    frames_BCHW: Tensor,
    steps: int,
    seed: int,
    advance: Callable[[], object],
) -> LatentDecoder:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = (frames_BCHW.shape[-2], frames_BCHW.shape[-1])
        decoder = LatentDecoder(model.frame_width, size).to(frames_BCHW.device)
    mean_CHW = to_values(frames_BCHW).mean(0)

    def loss() -> Tensor:
        rows = torch.randint(len(frames_BCHW), (BATCH,), generator=generator)
        batch_BCHW = frames_BCHW[rows]
        with torch.no_grad():
            latents_BD = model.newest(model.encode(batch_BCHW))
        return latent_loss(decoder, latents_BD, to_values(batch_BCHW), mean_CHW)

    for _ in descend(decoder.parameters(), loss, steps=steps, lr=LR):
        advance()
    return decoder.eval().requires_grad_(False)
