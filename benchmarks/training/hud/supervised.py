"""Networks trained from scratch on A's labels: plain, augmented, and with a HUD pasted at random.

Shape suffixes: B clips of a step, N labelled ones, Q scored ones, C channels, F frames, H and W
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.encoders.input_batch import InputBatch
from models.views import Augmentation, make_view
from pipelines.evaluation.supervised import CLIP_NORM, LR, WARMUP, WEIGHT_DECAY, Classifier

from .data import Clips, clips
from .encoders import untrained
from .probes import Examples, Scores, examples, score, test_rows
from .settings import NEW, OLD, TASKS, Settings

Training = Literal["plain", "augmented", "pasted"]
BATCH = 32
COLOUR = Augmentation(
    flip=0.0, ratio=(0.95, 1.05), colour=0.8, brightness=0.4, contrast=0.4, saturation=0.2,
    hue=0.05, grey=0.1, blur=0.0, blur_sigma=(0.1, 1.0), solarise=0.0,
)  # fmt: skip
SHIFT = (0.85, 1.0)
"""Area that a random crop keeps; its place shifts the picture."""
PANELS = 4
"""The most panels that are pasted over a clip."""


def supervised_scores(
    cfg: Settings, how: Training, kept: set[str], seed: int, count: int
) -> Scores:
    """Trains a network for every task on `count` labels a class; scores it on every variant."""
    train = clips(cfg, f"train/{OLD}")
    found: Scores = {str(count): {variant: {} for variant in (OLD, *NEW)}}
    steps = cfg.supervised_steps[cfg.labels.index(count)]
    for task in TASKS:
        labelled = examples(cfg, task, train)
        predict = _train(cfg, labelled, train, how, seed, count, steps)
        for variant in (OLD, *NEW):
            part = clips(cfg, f"test/{variant}")
            rows, _, values_Q = test_rows(cfg, task, part, kept)
            predicted = predict(as_tensor(part.pixels_NFHWC[rows]))
            result = score(task, labelled.bins, predicted, values_Q)
            found[str(count)][variant][task.name] = result
    return found


def _train(
    cfg: Settings,
    labelled: Examples,
    train: Clips,
    how: Training,
    seed: int,
    count: int,
    steps: int,
) -> Callable[[Tensor], np.ndarray]:
    """Trains one network; returns the function from clips to classes or numbers."""
    states, chosen = labelled.task.kind == "states", labelled.drawn(count, seed)
    game_rows = np.flatnonzero(train.games_N == labelled.task.game)
    pixels_N = as_tensor(train.pixels_NFHWC[game_rows[labelled.rows_N[chosen]]])
    values_N = torch.from_numpy(labelled.values_N[chosen])
    mean, std = values_N.mean(), values_N.std().clamp_min(1e-6)
    target_N = torch.from_numpy(labelled.bins_N[chosen]) if states else (values_N - mean) / std
    encoder = untrained(cfg, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = len(labelled.bins.edges) + 1 if states else 1
        assert encoder.network is not None
        model = Classifier(encoder.network, encoder.prep, outputs)
        _optimise(model, pixels_N, target_N, how, labelled.task.flips, steps)
    model.eval()

    @torch.no_grad()
    def predict(pixels_Q: Tensor) -> np.ndarray:
        out = torch.cat([model(InputBatch(part)) for part in pixels_Q.split(64)])
        return np.asarray(out.argmax(1) if states else out[:, 0] * std + mean)

    return predict


def _optimise(
    model: Classifier, pixels_N: Tensor, target_N: Tensor, how: Training, flips: bool, steps: int
) -> None:
    """AdamW with warm-up and cosine, as in `pipelines.evaluation.supervised`, for `steps` steps."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    order = torch.cat(
        [torch.randperm(len(target_N)) for _ in range(1 + steps * BATCH // len(target_N))]
    )
    for step in range(steps):
        rows_B = order[step * BATCH : (step + 1) * BATCH]
        progress = (step + 1) / steps
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
        optimizer.param_groups[0]["lr"] = LR * min(progress / WARMUP, cosine, 1)
        out = model(InputBatch(augmented(pixels_N[rows_B], how, flips)))
        whole = target_N.dtype == torch.int64
        target_B = target_N[rows_B]
        loss = F.cross_entropy(out, target_B) if whole else F.mse_loss(out[:, 0], target_B)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()


def augmented(pixels_BCFHW: Tensor, how: Training, flips: bool) -> Tensor:
    """Returns clips in [0, 255], changed in a random way; all frames of a clip alike.

    Colours change, a crop shifts the picture, and where the labels allow it half are mirrored. With
    `pasted` up to `PANELS` panels of random place, size, colour and pattern lie over each clip.
    """
    if how == "plain":
        return pixels_BCFHW
    names = ("area", "ratio", "left", "top", "flip", "blur", "sigma", "colour", "brightness")
    names += ("contrast", "saturation", "hue", "grey", "solarise")
    draws = {name: torch.rand(len(pixels_BCFHW)) for name in names}
    size = (pixels_BCFHW.shape[-2], pixels_BCFHW.shape[-1])
    view = 255 * make_view(pixels_BCFHW, draws, size, SHIFT, COLOUR)
    if flips:
        mirrored_B = (torch.rand(len(view)) < 0.5).view(-1, 1, 1, 1, 1)
        view = torch.where(mirrored_B, view.flip(-1), view)
    if how == "pasted":
        for clip in view:
            _paste(clip)
    return view


def _paste(clip_CFHW: Tensor) -> None:
    """Draws panels over a clip, in place: a flat colour, with random marks of another."""
    height, width = clip_CFHW.shape[-2:]
    for _ in range(int(torch.randint(0, PANELS + 1, ()))):
        high = int(torch.randint(max(1, height // 8), height // 2 + 1, ()))
        wide = int(torch.randint(max(1, width // 10), width // 2 + 1, ()))
        top = int(torch.randint(0, height - high + 1, ()))
        left = int(torch.randint(0, width - wide + 1, ()))
        ground, ink = 255 * torch.rand(2, clip_CFHW.shape[0], 1, 1, 1)
        marks = torch.rand(1, 1, -(-high // 3), -(-wide // 3)) < 0.3
        marks = marks.repeat_interleave(3, -2).repeat_interleave(3, -1)[..., :high, :wide]
        clip_CFHW[:, :, top : top + high, left : left + wide] = torch.where(marks, ink, ground)


def as_tensor(pixels_NFHWC: np.ndarray) -> Tensor:
    """Copies clips out of a memory map: uint8 [N, C, F, H, W]."""
    return torch.from_numpy(np.array(pixels_NFHWC)).movedim(-1, 1)
