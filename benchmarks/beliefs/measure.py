"""Measures what the runs of runs.py expect, and their surprise: the figures of docs/beliefs.md.

    python benchmarks/beliefs/measure.py --what cifar10 --folder beliefs
    python benchmarks/beliefs/measure.py --what digits --folder beliefs --seed 0
    python benchmarks/beliefs/measure.py --what games --folder beliefs --shards shards/test \\
        --train-shards shards/train
    python benchmarks/beliefs/measure.py --what rooms --folder beliefs

Writes `<what>-s<seed>.json` and `<what>-s<seed>.png` there. For digits, it also measures how far
from its true place a hidden digit is drawn, and whether surprise tells clips whose digit jumps.

Shape suffixes: B clips, C channels, T frames, H and W pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import torch
import tyro
from memory import cifar10, digit_clips, footage, moving_digits
from runs import GAME_FRAMES, Job, walks
from sheets import write_sheet
from torch import Tensor

from models.beliefs.expectation import Expectation
from models.beliefs.pixels import to_bytes, unpatchify
from models.planning.world_model.world_model import WorldModel
from pipelines.config.train import PretrainConfig
from pipelines.evaluation.beliefs.figures import Scene, measure
from pipelines.evaluation.beliefs.fitting import fit_decoders
from pipelines.evaluation.beliefs.masks import choose_masks
from pipelines.evaluation.beliefs.panels import Panel, make_panels
from pipelines.evaluation.beliefs.rollouts import Rollouts, rollout_study
from pipelines.evaluation.beliefs.study import ORDINARY, check_subject, study
from pipelines.evaluation.beliefs.surprises import calibrated, spliced, tells_apart
from pipelines.evaluation.beliefs.tokens import normalised_patches, pixel_values, tell
from pipelines.evaluation.subject import Subject, load_subject
from pipelines.runs.checkpoints import load_objective, new_objective

FIRST = 3
"""The first frame of every clip of digits."""
LEAST_JUMP = 8
"""Pixels that a digit jumps at least, in both directions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured(Job):
    """A run that is measured; `steps` are those of the decoders."""

    train_shards: str = ""
    """Games: the shards that the run was trained on."""
    surprise_only: bool = False
    """Train no decoders."""
    flow: bool = True
    """Measure samples of the flow decoder, too."""
    encoder_only: bool = False
    """Leave random weights and samples of the flow decoder out."""
    learned: int = 4000
    """Samples that decoders learn from, at most."""
    measured: int = 1000
    """Samples that are measured, at most."""


def samples(job: Measured, cfg: PretrainConfig) -> tuple[Tensor, Tensor]:
    """Pixels to learn from and to measure on."""
    if job.what == "cifar10":
        found = cifar10(job.folder)
        return found["train"][: job.learned], found["test"][: job.measured]
    if job.what == "digits":
        found = moving_digits(job.folder / "digits.npz")
        train = _digits(found["train"], job.learned, cfg)
        return train, _digits(found["test"], job.measured, cfg)
    clips = [
        footage(job.folder / f"games_{name}.npz", shards, cfg, GAME_FRAMES, limit)
        for name, shards, limit in (
            ("train", job.train_shards, 10**6),
            ("test", job.shards, job.measured),
        )
    ]
    middle = slice(4, 4 + cfg.clip_frames)
    train, test = (one[:, middle].transpose(1, 2).contiguous() for one in clips)
    # Spread over the games, which the shards hold one after the other.
    spread = torch.linspace(0, len(train) - 1, min(job.learned, len(train))).long()
    return train[spread], test


def _digits(grey_NTHW: Tensor, count: int, cfg: PretrainConfig) -> Tensor:
    rows = torch.arange(count)
    return digit_clips(grey_NTHW, rows, torch.full_like(rows, FIRST), cfg).contiguous()


def main(job: Measured) -> None:
    """Measures one run."""
    start, name = time.process_time(), f"{job.what}-s{job.seed}"
    newest = max((job.folder / name).glob("checkpoint_*"))
    results: dict[str, Any] = {"run": name, "checkpoint": newest.name}
    if job.what == "rooms":
        found_rooms = rooms(job, str(newest))
        keep(job, results | found_rooms.results, start)
        write_sheet(found_rooms.panels, 2, job.folder / f"{name}.png", zoom=2)
        return
    subject = load_subject(str(newest))
    assert subject.config is not None
    train, test = samples(job, subject.config)
    if job.surprise_only:
        keep(job, results | surprise_alone(job, subject, train, test), start)
        return
    steps = job.steps or 1500
    if job.encoder_only or not job.flow:
        scenes, panels = by_regression(job, subject, train, test, steps)
        rows = {one: measure(scene, job.seed) for one, scene in scenes.items()}
        results |= {"rows": rows, "steps": steps}
        results |= {"samples": len(test), "train_samples": len(train)}
        if job.what == "digits":
            results["places"] = places(scenes, test)
        keep(job, results, start)
        clips = test.ndim == 5
        file = job.folder / f"{name}.png"
        write_sheet(panels, 3 if clips else 8, file, zoom=2 if clips else 3)
        return
    found = study(subject, train, test, steps=steps, seed=job.seed)
    results |= found.results
    if job.what == "digits":
        results["places"] = places(found.scenes, test)
        results["teleports"] = tells_apart(
            found.surprises, subject.preprocessing, test, teleported(test, job.seed)
        )
    keep(job, results, start)
    clips = test.ndim == 5
    write_sheet(found.panels, 3 if clips else 8, job.folder / f"{name}.png", zoom=2 if clips else 3)


def keep(job: Measured, results: dict[str, Any], start: float) -> None:
    """Writes and prints the figures."""
    results["cpu_seconds"] = round(time.process_time() - start)
    text = json.dumps(results, indent=1)
    (job.folder / f"{job.what}-s{job.seed}.json").write_text(text)
    print(text)


def surprise_alone(
    job: Measured, subject: Subject, train: Tensor, test: Tensor
) -> dict[str, dict[str, float]]:
    """Whether the surprise of the run and of random weights tells cuts and jumps."""
    objective, cfg = check_subject(subject)
    prep, masks = subject.preprocessing, choose_masks(cfg)
    torch.manual_seed(job.seed)
    surprises = {}
    for name, one in (("encoder", objective), ("random_init", new_objective(cfg))):
        expectation = Expectation.of(one)
        with torch.no_grad():
            expectation.fit(normalised_patches(expectation, prep, train))
        surprises[name] = calibrated(expectation, prep, masks, train[:ORDINARY])
    found = {"cuts": tells_apart(surprises, prep, test, spliced(test))}
    if job.what == "digits":
        found["teleports"] = tells_apart(surprises, prep, test, teleported(test, job.seed))
    return found


def by_regression(
    job: Measured, subject: Subject, train: Tensor, test: Tensor, steps: int
) -> tuple[dict[str, Scene], list[Panel]]:
    """Trains decoders by regression for the run, and for random weights if they are wanted.

    Returns:
        What is measured, by row, and the run's panels.
    """
    objective, cfg = check_subject(subject)
    prep, masks, objectives = subject.preprocessing, choose_masks(cfg), {"encoder": objective}
    if not job.encoder_only:
        torch.manual_seed(job.seed)
        objectives["random_init"] = new_objective(cfg)
    scenes: dict[str, Scene] = {}
    panels: list[Panel] = []
    for name, one in objectives.items():
        expectation = Expectation.of(one)
        with torch.no_grad():
            expectation.fit(normalised_patches(expectation, prep, train))
        told = tell(expectation, prep, train, masks)
        decoders = fit_decoders(expectation, told, steps=steps, seed=job.seed, flow=False)
        mean_NP = pixel_values(expectation, train).mean(0)
        scenes[name] = Scene(expectation, prep, decoders, masks, test, mean_NP)
        panels = panels or make_panels(scenes[name], told, 8, job.seed)
    return scenes, panels


def rooms(job: Measured, checkpoint: str) -> Rollouts:
    """Imagines walks that nothing was trained on."""
    model = load_objective(checkpoint)[0].eval().requires_grad_(False)
    assert isinstance(model, WorldModel)
    train, _ = walks(job.seed)
    test, actions = walks(2**20 + job.seed, job.measured)
    both = (one.transpose(1, 2) for one in (train, test))
    return rollout_study(model, *both, actions, steps=job.steps or 1500, seed=job.seed)


def teleported(clips_BCTHW: Tensor, seed: int) -> Tensor:
    """Moves each digit from the middle of its clip on by a random jump, around the edges."""
    generator = torch.Generator().manual_seed(seed)
    half, side = clips_BCTHW.shape[2] // 2, clips_BCTHW.shape[-1]
    jumps_B2 = torch.randint(
        LEAST_JUMP, side - LEAST_JUMP + 1, (len(clips_BCTHW), 2), generator=generator
    )
    moved = clips_BCTHW.clone()
    for clip, jump in zip(moved, jumps_B2.tolist(), strict=True):
        clip[:, half:] = clip[:, half:].roll(jump, (-2, -1))
    return moved


def places(scenes: dict[str, Scene], clips_BCTHW: Tensor) -> dict[str, dict[str, float]]:
    """How far from its true place a digit is drawn in hidden frames, in pixels, for every mask.

    `expected` is what the predictor says, `true_tokens` what the decoder draws from the tokens that
    are there, `shuffled` another clip's expectation, `random_init` an untrained predictor's,
    `copy` the nearest frame that is seen, and `line` where a straight line through the two seen
    frames goes, read off their pixels.
    """
    found: dict[str, dict[str, float]] = {}
    for mask in scenes["encoder"].masks:
        drawn: dict[str, Tensor] = {}
        true_BT = middle(clips_BCTHW)
        for name, scene in scenes.items():
            told = tell(scene.expectation, scene.prep, clips_BCTHW, [mask])
            encoder = scene.expectation.encoder
            for what, tokens in (("expected", told.expected_BND), ("true", told.targets_BND)):
                values = scene.drawn(scene.decoders.regression, tokens, told.hidden_BN)
                drawn[f"{name}_{what}"] = middle(unpatchify(to_bytes(values), encoder))
        frames = sorted(set((mask.hidden_T // encoder.grid.per_step).tolist()))
        seen = sorted(set(range(clips_BCTHW.shape[2])) - set(frames))
        nearest = [min(seen, key=lambda one, frame=frame: abs(one - frame)) for frame in frames]
        told_of = {
            "expected": drawn["encoder_expected"][:, frames],
            "true_tokens": drawn["encoder_true"][:, frames],
            "shuffled": drawn["encoder_expected"].roll(1, 0)[:, frames],
            "copy": true_BT[:, nearest],
            "line": line(true_BT, seen, frames),
        }
        if "random_init" in scenes:
            told_of["random_init"] = drawn["random_init_expected"][:, frames]
        hidden = " and ".join(str(frame + 1) for frame in frames)
        found[f"frames {hidden} of 4 hidden"] = {
            name: apart(places_BT, true_BT[:, frames]) for name, places_BT in told_of.items()
        }
    return found


def middle(clips_BCTHW: Tensor) -> Tensor:
    """Returns the middle of what is bright in each frame, as phases around the edges, [B, T, 2].

    What wraps around the edges has no mean place, but a mean phase.
    """
    grey_BTHW = clips_BCTHW[:, 0].double()
    bright_BTHW = (grey_BTHW - 0.2 * grey_BTHW.amax((-2, -1), keepdim=True)).clamp(min=0)
    side = bright_BTHW.shape[-1]
    turns = torch.exp(2j * math.pi * torch.arange(side, dtype=torch.float64) / side)
    rows_BT = (bright_BTHW.sum(-1) * turns).sum(-1).angle()
    columns_BT = (bright_BTHW.sum(-2) * turns).sum(-1).angle()
    return torch.stack([rows_BT, columns_BT], dim=-1)


def apart(ours: Tensor, true: Tensor, side: int = 32) -> float:
    """Returns the mean distance of places given as phases, in pixels, around the edges."""
    turned = torch.remainder(ours - true + math.pi, 2 * math.pi) - math.pi
    return float((turned * side / (2 * math.pi)).norm(dim=-1).mean())


def line(true_BT2: Tensor, seen: list[int], frames: list[int]) -> Tensor:
    """Returns the places on the line through the two seen frames, as phases."""
    first, last = seen[0], seen[-1]
    step = torch.remainder(true_BT2[:, last] - true_BT2[:, first] + math.pi, 2 * math.pi) - math.pi
    speed = step / (last - first)
    return torch.stack([true_BT2[:, first] + speed * (frame - first) for frame in frames], dim=1)


if __name__ == "__main__":
    main(tyro.cli(Measured, description=__doc__))
