"""The probes of the table: ridge regression on features of A, read on every variant.

States are classes (bins of equal shares), predicted as the largest of one output a class; counts
and distances are numbers. Features are standardised by the labelled clips. With an alignment, the
features of a new HUD first get the mean, or mean and covariance, of A's, which takes no label.

Shape suffixes: N labelled clips, Q clips that are scored, D feature width, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from pipelines.evaluation.arrays import standardise
from pipelines.evaluation.drift import unpaired_alignment
from pipelines.evaluation.probes.number_probe import number_score
from pipelines.evaluation.ridge import fit_ridge
from pipelines.evaluation.state_labels import Bins

from .data import Clips, clips, game_key, values_of
from .encoders import Encoder, features_by_game
from .settings import NEW, OLD, TASKS, Settings, Task

BINS = 4
Alignment = Literal["mean", "covariance"]
Scores = dict[str, dict[str, dict[str, dict[str, float | None]]]]
"""By number of labels a class, variant, and task: `score` in % and, of numbers, `r2`."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A task's labelled and scored clips, as rows among the clips of its game."""

    task: Task
    rows_N: np.ndarray
    values_N: np.ndarray
    bins_N: np.ndarray
    """Which quarter of the training values each is in: what is drawn from, and a state's class."""
    bins: Bins

    def drawn(self, per_class: int, seed: int) -> np.ndarray:
        """Draws as many of each bin, or all that it has; indices into `rows_N`."""
        rng = np.random.default_rng([seed, per_class])
        found = [rng.permutation(np.flatnonzero(self.bins_N == b))[:per_class] for b in range(BINS)]
        return np.sort(np.concatenate(found))


def examples(cfg: Settings, task: Task, train: Clips) -> Examples:
    """Reads the labels of a task."""
    rows, values_N = values_of(cfg, task, train)
    within = np.cumsum(train.games_N == task.game) - 1
    bins = _bins(values_N)
    return Examples(
        task=task,
        rows_N=within[rows],
        values_N=values_N,
        bins_N=bins.classes(values_N.astype(np.float64)),
        bins=bins,
    )


def _bins(values_N: np.ndarray) -> Bins:
    """Quarters of the values; of a count with few values, as many bins as differ."""
    edges = np.quantile(values_N, np.arange(1, BINS) / BINS, method="higher")
    return Bins(tuple(sorted({float(edge) for edge in edges if edge > values_N.min()})))


def test_rows(cfg: Settings, task: Task, part: Clips, kept: set[str]) -> tuple[np.ndarray, ...]:
    """Returns the scored clips of a task, as rows of the set and of its game, and their values."""
    rows, values_Q = values_of(cfg, task, part)
    stays = np.array([game_key(task.game, key) in kept for key in part.keys_N[rows]], bool)
    within = np.cumsum(part.games_N == task.game) - 1
    return rows[stays], within[rows[stays]], values_Q[stays]


def score(task: Task, bins: Bins, predicted: np.ndarray, values_Q: np.ndarray) -> dict[str, Any]:
    """Scores class indices or numbers: accuracy or rank correlation in %, and R2 of numbers."""
    if task.kind == "states":
        hits_Q = predicted == bins.classes(values_Q.astype(np.float64))
        return {"score": 100 * float(hits_Q.mean()), "clips": len(values_Q)}
    found = number_score(predicted, values_Q)
    return {"score": 100 * (found.spearman or 0.0), "r2": found.r2, "clips": len(values_Q)}


def probe_scores(
    cfg: Settings,
    encoders: Mapping[str, Encoder],
    kept: set[str],
    seed: int,
    align: Alignment | None = None,
    foreign: bool = False,
) -> Scores:
    """Fits the probes on A's labels and reads them on every variant's test clips.

    Args:
        cfg: the benchmark's settings.
        encoders: the encoder for each variant that is scored; the probe of a variant is fitted on
            the features of A by that variant's encoder. The scores on A are the means over them.
        kept: test clips that count, from `data.kept_keys`.
        seed: of the draws of labels.
        align: gives the features of a new variant the mean or the covariance of A's.
        foreign: the negative control: the statistics of the new variant are another game's.
    """
    train, old = clips(cfg, f"train/{OLD}"), clips(cfg, f"test/{OLD}")

    def features(encoder: Encoder, name: str) -> dict[str, np.ndarray]:
        return features_by_game(cfg, encoder, name)

    found: Scores = {}
    for task in TASKS:
        labelled = examples(cfg, task, train)
        source = _other_game(task.game) if foreign else task.game
        for count in cfg.labels:
            chosen = labelled.drawn(count, seed)
            on_old = []
            for variant, encoder in encoders.items():
                bank_ND = features(encoder, f"train/{OLD}")[task.game][labelled.rows_N[chosen]]
                predict = _fit(labelled, chosen, bank_ND)
                read = {OLD: old, variant: clips(cfg, f"test/{variant}")}
                for name, part in read.items():
                    _, rows, values_Q = test_rows(cfg, task, part, kept)
                    x_QD = features(encoder, f"test/{name}")[task.game][rows]
                    if align and name != OLD:
                        new_MD = features(encoder, f"new/{name}")[source]
                        old_ND = features(encoder, f"train/{OLD}")[task.game]
                        x_QD = unpaired_alignment(new_MD, old_ND, align)(x_QD)
                    result = score(task, labelled.bins, predict(x_QD), values_Q)
                    if name == OLD:
                        on_old.append(result)
                    else:
                        place = found.setdefault(str(count), {}).setdefault(name, {})
                        place[task.name] = result
            place = found.setdefault(str(count), {}).setdefault(OLD, {})
            place[task.name] = _mean(on_old)
    return found


def _other_game(game: str) -> str:
    """Returns the game half-way round the alphabet."""
    games = sorted({task.game for task in TASKS})
    return games[(games.index(game) + len(games) // 2) % len(games)]


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    known = {k: [r[k] for r in results if r[k] is not None] for k in results[0]}
    return {k: sum(v) / len(v) if v else None for k, v in known.items()}


def _fit(
    labelled: Examples, chosen: np.ndarray, bank_ND: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fits a ridge regression; returns the function from features to classes or numbers."""
    states = labelled.task.kind == "states"
    target = labelled.bins_N[chosen] if states else labelled.values_N[chosen]
    y = torch.from_numpy(target)
    y_NC = F.one_hot(y).double() if states else y[:, None].double()
    raw_ND = torch.from_numpy(bank_ND)
    ridge = fit_ridge(standardise(raw_ND, raw_ND)[0], y_NC)

    def predict(x_QD: np.ndarray) -> np.ndarray:
        out_QC = ridge.predict(standardise(raw_ND, torch.from_numpy(x_QD))[1])
        return np.asarray(out_QC.argmax(1) if states else out_QC[:, 0])

    return predict


def to_every_new(encoder: Encoder) -> dict[str, Encoder]:
    """One encoder for all new variants."""
    return dict.fromkeys(NEW, encoder)
