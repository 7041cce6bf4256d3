"""Chooses the block of an encoder that the probes read, on training samples alone.

A linear function of a block's features is fitted to nine tenths of the training set (ridge
regression, with the penalty of least leave-one-out error) and read on the tenth that is left. The
block that is read best there is chosen, so the test set has no part in it. Untrained encoders
choose in the same way; otherwise a lead over them would also be the lead of having a choice.

Shape suffixes: N samples, L blocks, D feature width, C outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from models.encoders.block_outputs import first_blocks
from models.encoders.vit import VisionTransformer
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.shards import Manifest
from pipelines.evaluation.arrays import Scaling, accuracy_of, as_labels, held_out_split
from pipelines.evaluation.input_sets import check_tokens, read_blocks
from pipelines.evaluation.probe_sets import ProbeSet, number_set
from pipelines.evaluation.probes.number_probe import number_score
from pipelines.evaluation.probes.probe import Row
from pipelines.evaluation.ridge import fit_ridge
from pipelines.evaluation.subject import Subject

BLOCK_BYTES = 4 * 2**30
"""Upper limit in bytes for the features of all blocks; a larger set is drawn from."""
CHOSEN = "_block"
"""Ends the name of the row of a chosen block, after that of the encoder."""
HELD_OUT = 0.1
"""Share of the training samples that chooses."""

Score = Callable[[Tensor, np.ndarray], float | None]
"""Scores outputs [N, C] of held-out samples by their labels [N]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScores:
    """How well each block of an encoder is read on held-out samples, first block first."""

    chosen: int
    """The block with the best `score`, counted from 1; of several, the last."""
    score: list[float]
    """Mean of the accuracy and of every number's R2, which counts as 0 where it is negative."""
    accuracy: list[float] | None
    """Share of the classes that are recognised; None where there are only numbers."""
    numbers: dict[str, list[float | None]]
    """R2 of each number; None where the held-out numbers are all equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The choice, as results.json holds it."""

    samples: int
    """Training samples that it is based on, held-out ones included."""
    rows: dict[str, BlockScores]
    """By the row of the encoder that chose."""


def choose_blocks(
    cfg: EvaluateConfig,
    subject: Subject,
    encoders: Mapping[str, VisionTransformer],
    manifests: Sequence[Manifest],
    console: Console,
) -> Blocks:
    """Computes the features of every block in one pass over the training set, and chooses.

    Args:
        cfg: the job.
        subject: the encoder.
        encoders: it and its untrained twin, by their rows of results.json.
        manifests: of the sets, in the order of their flags; only the first set is read.
        console: where the progress is shown.

    Raises:
        ValueError: there are fewer than two samples with a label, or too many for the attentive
            probes of a block besides the last.
    """
    check_tokens(cfg, subject, manifests, others=len(encoders))  # fails now or never
    depth, width = subject.encoder.depth, subject.encoder.width
    most = BLOCK_BYTES // (4 * len(encoders) * depth * width)
    few = dataclasses.replace(cfg, limit=min(most, cfg.limit or most))
    part = read_blocks(few, subject, encoders, manifests, console)
    if len(part.labels_N) < 2:
        raise ValueError("--layers all: needs two labelled samples in --data, to hold one out")
    device = subject.encoder.norm.weight.device
    rows = {row: score_blocks(part, row, depth, cfg, device) for row in encoders}
    return Blocks(samples=len(part.labels_N), rows=rows)


def chosen_encoders(
    blocks: Blocks, encoders: Mapping[str, VisionTransformer]
) -> dict[str, VisionTransformer]:
    """Returns encoders that end at the chosen blocks, by the row that each one's features get.

    An encoder that chose its last block is left out: its features are there already.
    """
    return {
        row + CHOSEN: first_blocks(encoder, blocks.rows[row].chosen)
        for row, encoder in encoders.items()
        if blocks.rows[row].chosen < encoder.depth
    }


def with_chosen_blocks(rows: Mapping[str, Row], blocks: Blocks) -> dict[str, Row]:
    """Puts each encoder's row of its chosen block after that of its last, which it may be."""
    found: dict[str, Row] = {}
    for name, row in rows.items():
        if name.endswith(CHOSEN):
            continue
        found[name] = row
        if name in blocks.rows:
            found[name + CHOSEN] = rows.get(name + CHOSEN, row)
    return found


def score_blocks(
    part: ProbeSet, row: str, depth: int, cfg: EvaluateConfig, device: torch.device
) -> BlockScores:
    """Scores every block of an encoder and chooses one.

    Args:
        part: training samples with the features of all blocks side by side, [N, L * D].
        row: whose features.
        depth: L.
        cfg: says what is read, and the seed of the held-out share.
        device: where the fits run.
    """
    accuracy = None
    if cfg.has_classes:
        one_hot_NC = F.one_hot(as_labels(part.labels_N))
        found = _held_out_scores(part, row, depth, one_hot_NC, _accuracy, cfg.seed, device)
        accuracy = [score or 0.0 for score in found]
    numbers = {}
    for name in part.numbers:
        finite = number_set(part, name)
        values_N1 = torch.from_numpy(finite.labels_N)[:, None]
        numbers[name] = _held_out_scores(finite, row, depth, values_N1, _r2, cfg.seed, device)
    columns = [*([] if accuracy is None else [accuracy]), *numbers.values()]
    score = [float(np.mean([max(0.0, v or 0.0) for v in of])) for of in zip(*columns, strict=True)]
    chosen = depth - score[::-1].index(max(score))
    return BlockScores(chosen=chosen, score=score, accuracy=accuracy, numbers=numbers)


def _held_out_scores(
    part: ProbeSet,
    row: str,
    depth: int,
    targets_NC: Tensor,
    score: Score,
    seed: int,
    device: torch.device,
) -> list[float | None]:
    """Fits the targets by each block's features and scores what is read on the held-out tenth."""
    held, fits = held_out_split(len(part.labels_N), HELD_OUT, seed)
    found = []
    for features_ND in np.split(part.features[row], depth, axis=1):
        x_ND = torch.from_numpy(features_ND).to(device).double()
        scaling = Scaling.of(x_ND[fits])
        ridge = fit_ridge(scaling(x_ND[fits]), targets_NC[fits])
        read_NC = ridge.predict(scaling(x_ND[held])).cpu()
        found.append(score(read_NC, part.labels_N[held]))
    return found


def _accuracy(read_NC: Tensor, labels_N: np.ndarray) -> float:
    return accuracy_of(read_NC.argmax(dim=1), labels_N)


def _r2(read_N1: Tensor, values_N: np.ndarray) -> float | None:
    return number_score(read_N1[:, 0], values_N).r2
