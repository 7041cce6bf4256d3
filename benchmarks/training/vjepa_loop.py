"""V-JEPA on moving digits in memory: what of the direction it learns, and a control.

    python benchmarks/training/vjepa_loop.py --cache digits.npz
    python benchmarks/training/vjepa_loop.py --cache digits.npz --shuffle-frames

The objective, masks and schedule of the recipe `vjepa_motion`, on clips that are drawn as
`pipelines.fetch movingmnist` draws them but are neither encoded nor read by Ray, so that a run
takes five CPU minutes. A direction is two things: its axis, which a heap of frames in any order
shows, and which way along it, which only their order shows. Probes read both, from clips in order,
from clips whose frames are in random order, and from a single frame.

Shape suffixes: N clips, B of a batch, C = 3 channels, T frames, H and W pixels, D feature width.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

if __name__ == "__main__" and not __package__:  # so that it finds the drawing of digits
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.beliefs.memory import moving_digits
from models.encoders.vit import VisionTransformer
from models.keyed_random.arrays import sample_keys
from models.media.preprocessing import normalize
from models.objectives.registry import build_objective
from pipelines.config.train import PretrainConfig
from pipelines.evaluation.probes.knn import knn_predict
from pipelines.evaluation.probes.linear import PROBE_LRS, PROBE_WEIGHT_DECAYS, fit_linear
from pipelines.fetchers.moving_mnist import DIRECTIONS, FRAMES
from pipelines.loading.masks.spacetime import video_masks
from pipelines.recipes.registry import RECIPES

AXES = len(DIRECTIONS) // 2
HEADS = [(lr, decay) for lr in PROBE_LRS for decay in PROBE_WEIGHT_DECAYS]
MIDDLE = 3
"""First frame of a clip that is probed; one to train on begins at 0 to 7."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run."""

    cache: Path
    """File for the drawn clips (.npz); read if it exists."""
    shuffle_frames: bool = False
    """The control: put the frames of every clip to train on in random order."""
    seed: int = 0
    """Of the weights, the batches and the masks."""
    steps: int = 2500
    """Steps of the schedule."""
    stop_after: int | None = None
    """Ends earlier."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """Clips [N, 20, 32, 32] and their directions [N] of one split."""

    pixels: torch.Tensor
    labels_N: torch.Tensor

    def clips(self, rows_B: torch.Tensor, first_B: torch.Tensor, stride: int) -> torch.Tensor:
        """Returns clips of four frames, uint8 [B, C, T, H, W]."""
        frames_BT = first_B[:, None] + stride * torch.arange(4)
        return self.pixels[rows_B[:, None], frames_BT][:, None].expand(-1, 3, -1, -1, -1)


def read_digits(cache: Path) -> dict[str, Digits]:
    """Reads the clips from the cache, or draws them and fills it."""
    return {
        name: Digits(pixels=pixels, labels_N=torch.arange(len(pixels)) % len(DIRECTIONS))
        for name, pixels in moving_digits(cache).items()
    }


def in_random_order(clips: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shuffles the frames of every clip by itself."""
    orders = [torch.from_numpy(rng.permutation(clips.shape[2])) for _ in clips]
    return torch.stack([clip[:, order] for clip, order in zip(clips, orders, strict=True)])


@torch.no_grad()
def features(encoder: VisionTransformer, part: Digits, count: int, how: str, cfg: Any) -> Any:
    """Computes mean tokens [N, D] of clips `in order`, `shuffled` or of a `single frame`."""
    rng, found = np.random.default_rng(1), []
    for rows_B in torch.split(torch.arange(count), 250):
        clips = part.clips(rows_B, torch.full_like(rows_B, MIDDLE), cfg.clip.stride)
        if how == "shuffled":
            clips = in_random_order(clips, rng)
        if how == "single frame":
            clips = clips[:, :, 2:3].expand_as(clips)
        found.append(encoder(normalize(clips, cfg.model.mean, cfg.model.std)).mean(1))
    return torch.cat(found)


def accuracies(train_ND: Any, learned_N: Any, test_ND: Any, asked_N: Any) -> np.ndarray:
    """Returns the accuracy in % of the linear probe and of kNN."""
    linear = fit_linear(train_ND, learned_N, HEADS, epochs=50).predict(test_ND)
    nearest = knn_predict(train_ND, learned_N, test_ND)
    return np.array([100 * float((p == asked_N).float().mean()) for p in (linear, nearest)])


def report(name: str, encoder: VisionTransformer, digits: dict[str, Digits], cfg: Any) -> None:
    """Prints how well direction, axis, and the way along a known axis are read."""
    encoder.eval()
    learned_N, asked_N = digits["train"].labels_N[:2000], digits["test"].labels_N
    for how in ("in order", "shuffled", "single frame"):
        bank = features(encoder, digits["train"], 2000, how, cfg)
        query = features(encoder, digits["test"], len(asked_N), how, cfg)
        scores = {
            "direction": accuracies(bank, learned_N, query, asked_N),
            "axis": accuracies(bank, learned_N % AXES, query, asked_N % AXES),
            "way along the axis": np.mean(
                [
                    accuracies(bank[a], learned_N[a] // AXES, query[b], asked_N[b] // AXES)
                    for a, b in ((learned_N % AXES == k, asked_N % AXES == k) for k in range(AXES))
                ],
                axis=0,
            ),
        }
        cells = [f"{what} {linear:.1f} / {knn:.1f}" for what, (linear, knn) in scores.items()]
        print(f"{name}, {how}: linear / kNN: {', '.join(cells)}", flush=True)
    encoder.train()


def train(run: Run, cfg: PretrainConfig, digits: dict[str, Digits]) -> VisionTransformer:
    """Trains as the recipe says; returns the target encoder."""
    torch.manual_seed(run.seed)
    rng = np.random.default_rng(run.seed)
    network = build_objective(
        cfg.objective.name, model=cfg.model_settings, objective=cfg.objective_settings
    )
    encoder = network.feature_encoder
    assert isinstance(encoder, VisionTransformer)
    report("random weights", encoder, digits, cfg)
    params = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    start, count = time.process_time(), run.stop_after or run.steps
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, run.steps, cfg)
        out = network(batch_of(run, cfg, digits["train"], encoder.grid, rng, step))
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 10.0)
        optimizer.step()
        network.after_step(step, run.steps)
        if (step + 1) % 250 == 0:
            spent = (time.process_time() - start) / (step + 1)
            print(f"step {step + 1}: loss {out.loss.item():.3f}, {spent:.3f} CPU s a step")
    return encoder


def batch_of(
    run: Run, cfg: PretrainConfig, digits: Digits, grid: Any, rng: np.random.Generator, step: int
) -> dict[str, torch.Tensor]:
    """Draws clips and masks."""
    size = cfg.data.batch_size
    rows_B = torch.from_numpy(rng.integers(len(digits.pixels), size=size))
    first_B = torch.from_numpy(rng.integers(FRAMES - 3 * (cfg.clip.stride or 1), size=size))
    clips = digits.clips(rows_B, first_B, cfg.clip.stride or 1)
    if run.shuffle_frames:
        clips = in_random_order(clips, rng)
    ids = rng.integers(256, size=(size, 16), dtype=np.uint8)
    ((context, target),) = video_masks(sample_keys(ids, run.seed, step), grid, cfg.video_mask)
    masks = {"context_ids_0": context, "target_ids_0": target}
    return {"clips": clips} | {key: torch.from_numpy(v).long() for key, v in masks.items()}


def rate(step: int, steps: int, cfg: PretrainConfig) -> float:
    """The recipe's learning rate: linear warm-up, then a cosine."""
    low, high, last = cfg.optim.start_lr, cfg.optim.lr, cfg.optim.final_lr
    warm = cfg.optim.warmup_steps
    if step < warm:
        return low + (high - low) * step / warm
    return last + (high - last) * 0.5 * (1 + float(np.cos(np.pi * (step - warm) / (steps - warm))))


def main(run: Run) -> None:
    """Trains and prints what the probes read before and after."""
    torch.set_num_threads(1)
    cfg, digits = RECIPES["vjepa_motion"][1], read_digits(run.cache)
    report("trained", train(run, cfg, digits), digits, cfg)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
