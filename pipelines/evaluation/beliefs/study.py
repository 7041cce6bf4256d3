"""All that is measured and drawn of a predictor's expectations, beside random weights.

Shape suffixes: B samples, N tokens of a sample, P pixel values per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.beliefs.expectation import Expectation, Surprise
from models.media.preprocessing import Preprocessing
from models.objectives.objective import Objective
from pipelines.config.train import PretrainConfig
from pipelines.evaluation.beliefs.figures import Scene, measure
from pipelines.evaluation.beliefs.fitting import fit_decoders
from pipelines.evaluation.beliefs.masks import choose_masks
from pipelines.evaluation.beliefs.panels import Panel, make_panels
from pipelines.evaluation.beliefs.surprises import (
    calibrated,
    errors_of,
    spliced,
    tells_apart,
)
from pipelines.evaluation.beliefs.tokens import Told, normalised_patches, pixel_values, tell
from pipelines.evaluation.subject import Subject
from pipelines.runs.checkpoints import new_objective

LEARNED, MEASURED = 4000, 1000
"""Samples that decoders learn from, and samples that they are measured on, at most."""
SHOWN, ORDINARY = 8, 512
"""Samples that are drawn, and ordinary samples that usual errors are told from."""
PASSES = 5
"""Decoders that are trained: three for the encoder, two for random weights."""


@dataclass(frozen=True)
class Study:
    """What was found."""

    results: dict[str, Any]
    """For results.json: `rows` by encoder (`figures.measure`), for clips `cuts`
    (`surprises.tells_apart`), and counts."""
    panels: list[Panel]
    """Pictures of the first samples."""
    scenes: dict[str, Scene]
    """What was measured, by row."""
    surprises: dict[str, Surprise]
    """Calibrated on training samples, by row."""
    shown: Tensor
    """Samples for the map of surprise: the first, then the most surprising of the test set."""
    maps_BN: Tensor
    """Their surprise by token."""
    whole_B: Tensor
    """Their surprise as a whole."""


def study(
    subject: Subject,
    train: Tensor,
    test: Tensor,
    *,
    steps: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Study:
    """Trains decoders on frozen tokens and measures what they show, and surprise.

    Args:
        subject: the run.
        train: uint8 images [B, C, H, W] or clips [B, C, T, H, W] to learn from.
        test: the same, to measure on.
        steps: optimizer steps of every decoder.
        seed: of decoders, of random weights, and of samples.
        advance: is called `PASSES * steps` times.

    Raises:
        ValueError: see `check_subject`.
    """
    objective, cfg = check_subject(subject)
    prep, device = subject.preprocessing, next(subject.encoder.parameters()).device
    masks = choose_masks(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = new_objective(cfg)
    rows: dict[str, Any] = {}
    surprises: dict[str, Surprise] = {}
    scenes: dict[str, Scene] = {}
    known: dict[str, Told] = {}
    for name, one in (("encoder", objective), ("random_init", untrained)):
        expectation = Expectation.of(one).to(device)
        with torch.no_grad():
            expectation.fit(normalised_patches(expectation, prep, train))
        told = tell(expectation, prep, train, masks)
        flow = name == "encoder"
        decoders = fit_decoders(
            expectation, told, steps=steps, seed=seed, flow=flow, advance=advance
        )
        mean_NP = pixel_values(expectation, train).mean(0)
        scene = Scene(expectation, prep, decoders, masks, test, mean_NP)
        rows[name] = measure(scene, seed)
        surprises[name] = calibrated(expectation, prep, masks, train[:ORDINARY])
        scenes[name], known[name] = scene, told
    counts = {"samples": len(test), "train_samples": len(train), "masks": len(masks)}
    results: dict[str, Any] = {"rows": rows, "steps": steps, **counts}
    if test.ndim == 5:
        results["cuts"] = tells_apart(surprises, prep, test, spliced(test))
    return Study(
        results,
        make_panels(scenes["encoder"], known["encoder"], SHOWN, seed),
        scenes,
        surprises,
        *_surprising(surprises["encoder"], prep, test),
    )


def check_subject(subject: Subject, flag: str = "--checkpoint") -> tuple[Objective, PretrainConfig]:
    """Returns the run's objective and configuration.

    Args:
        subject: the run.
        flag: what asks for it.

    Raises:
        ValueError: there is no run, its objective predicts no tokens, or samples may lack tokens.
    """
    if subject.objective is None or subject.config is None:
        raise ValueError(
            f"{flag}: {subject.name} is an encoder alone, without the predictor whose "
            "expectations are drawn.\nGive --checkpoint the run or the checkpoint that it is from."
        )
    try:
        Expectation.of(subject.objective)
        check_whole(subject.preprocessing)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    return subject.objective, subject.config


def check_whole(prep: Preprocessing) -> None:
    """Raises a ValueError if samples may lack tokens, which the fixed masks need."""
    if prep.partial:
        flag = "fit whole" if prep.fit == "whole" else "--exclude"
        raise ValueError(
            f"{flag}: samples may lack tokens, but what a predictor expects is measured behind "
            "masks of the whole grid. Leave nothing out."
        )


def _surprising(
    surprise: Surprise, prep: Preprocessing, test: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    errors_BN = errors_of(surprise, prep, test)
    whole_B = surprise.whole(errors_BN)
    half = SHOWN // 2
    most = whole_B[half:].argsort(descending=True)[:half] + half
    rows = torch.cat([torch.arange(min(half, len(test))), most.cpu()])
    return test[rows], surprise.map(errors_BN[rows.to(errors_BN.device)]).cpu(), whole_B[rows].cpu()
