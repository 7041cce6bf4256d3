"""How well encoders of footage with recorded states read them from few labels, beside their own
random weights.

    python benchmarks/training/vjepa_states.py --runs runs/s0 runs/s1 --data shards/train \
        --test shards/test --columns train/columns.json --game my_way_home \
        --states POSITION_X POSITION_Y ANGLE

A state's class is one of four bins of equal shares. Of all clips of --data a few hundred count as
labelled, in several draws, because one draw of so few moves a linear probe by three points. Probes
are those of `pipelines.evaluate` and ridge regression, all of the mean token.

Shape suffixes: N clips of --data, L labelled ones, Q scored ones, D feature width, C classes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from torch.nn import functional as F

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.rows import iter_labelled
from pipelines.evaluation.arrays import accuracy_of, standardise
from pipelines.evaluation.features import extract_features
from pipelines.evaluation.probes.knn import knn_predict
from pipelines.evaluation.probes.linear import linear_probe
from pipelines.evaluation.ridge import fit_ridge
from pipelines.evaluation.state_labels import Bins, find_column, state_reader
from pipelines.evaluation.subject import Subject, load_subject, random_init, with_sampler

BINS = 4
PROBES = ("linear", "ridge", "kNN")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is read, and from where."""

    runs: tuple[Path, ...]
    """Run folders, all with the same clips and size of input."""
    data: Path
    """Shards of the game's footage, of which some clips count as labelled."""
    test: Path
    """Shards of other episodes of it."""
    columns: Path
    """columns.json of the footage."""
    game: str
    """The game in it."""
    states: tuple[str, ...]
    """Columns to read."""
    labelled: int = 388
    """Clips with a label."""
    draws: int = 5
    """Draws of them."""


def accuracies(
    bank_LD: torch.Tensor, classes_L: torch.Tensor, query_QD: torch.Tensor, asked_Q: torch.Tensor
) -> list[float]:
    """Returns the accuracy in % of each of `PROBES`."""
    linear = linear_probe(bank_LD, classes_L, query_QD, asked_Q).accuracy
    scaled_LD, scaled_QD = standardise(bank_LD, query_QD)
    one_hot_LC = F.one_hot(classes_L, BINS).double()
    ridge = fit_ridge(scaled_LD.double(), one_hot_LC).predict(scaled_QD.double()).argmax(1)
    nearest = knn_predict(bank_LD, classes_L, query_QD)
    return [100 * linear, *(100 * accuracy_of(p, asked_Q) for p in (ridge, nearest))]


def read(run: Run, cfg: EvaluateConfig, subject: Subject, tables: dict[str, Any]) -> dict[str, Any]:
    """Scores one encoder: the mean over draws, for every state."""
    assert subject.sampler is not None
    features = {
        part: torch.from_numpy(
            extract_features(subject.encoder, subject.preprocessing, table, sampler=subject.sampler)
        )
        for part, table in tables.items()
    }
    rng = np.random.default_rng(cfg.seed)
    drawn = [rng.permutation(len(features["data"]))[: run.labelled] for _ in range(run.draws)]
    found = {}
    for name in run.states:
        value = state_reader(find_column(cfg, name), subject.sampler)
        values_N, values_Q = value(tables["data"]), value(tables["test"])
        scores = []
        for rows in drawn:
            bins = Bins.of(values_N[rows], BINS)
            classes_L, asked_Q = (
                torch.from_numpy(bins.classes(v)) for v in (values_N[rows], values_Q)
            )
            bank_LD = features["data"][torch.from_numpy(rows)]
            scores.append(accuracies(bank_LD, classes_L, features["test"], asked_Q))
        found[name] = dict(zip(PROBES, np.mean(scores, 0).round(1).tolist(), strict=True))
    return found


def main(run: Run) -> None:
    """Prints a line of JSON for every run and for its random weights, and their difference."""
    torch.set_num_threads(1)
    tables = {
        part: pa.concat_tables(list(iter_labelled(str(uri), beside=("states",))))
        for part, uri in (("data", run.data), ("test", run.test))
    }
    for path in run.runs:
        subject = load_subject(str(path))
        assert subject.config is not None, f"{path} is no run"
        cfg = EvaluateConfig(
            checkpoint=str(path),
            data=str(run.data),
            test=str(run.test),
            state=run.states[0],
            columns=str(run.columns),
            only=run.game,
            seed=subject.config.run.seed,
        )
        trained = with_sampler(cfg, subject, "video")
        untrained = dataclasses.replace(trained, encoder=random_init(trained.encoder, cfg.seed))
        rows = {"trained": trained, "random": untrained}
        scores = {row: read(run, cfg, one, tables) for row, one in rows.items()}
        means = {
            row: {p: float(np.mean([s[p] for s in found.values()])) for p in PROBES}
            for row, found in scores.items()
        }
        gain = {p: round(means["trained"][p] - means["random"][p], 1) for p in PROBES}
        print(json.dumps({"run": path.name, "gain": gain, "states": scores}), flush=True)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
