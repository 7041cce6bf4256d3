"""Columns of results: told once by their probes, the same in every table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes import registry
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask
from pipelines.evaluation.report.tables import results_rows, table_of

FEW = {"mean": 0.25, "std": 0.01, "labelled": 10, "draws": 5}
ROW: dict[str, Any] = {
    "knn": 0.5,
    "knn_shift": None,
    "linear": {"accuracy": 0.75},
    "few_shot_1pct": FEW,
    "few_shot_10": FEW,
    "width": 48,
    "rankme": 12.34,
}
RAW = {key: value for key, value in ROW.items() if key != "rankme"} | {"knn": 0.25}


def texts(rows: dict[str, Any]) -> dict[str, list[str | None]]:
    """The headings and every row's cells."""
    table = table_of(rows)
    cells = {name: [cell.text for cell in row] for name, row in table.rows.items()}
    return {"": [column.name for column in table.columns], **cells}


def test_a_column_without_a_number_is_left_out_and_a_cell_without_one_is_empty() -> None:
    few = "25.0 \u00b1 1.0"
    assert texts({"ours": ROW, "raw": RAW}) == {
        "": ["kNN", "Linear probe", "1% of labels", "10 per class", "RankMe"],
        "ours": ["50.0", "75.0", few, few, "12.3 of 48"],
        "raw": ["25.0", "75.0", few, few, None],
    }


def test_the_best_of_a_column_is_marked_unless_none_is_better() -> None:
    ours, raw = table_of({"ours": ROW, "raw": RAW}).rows.values()
    assert [(cell.best, cell.share) for cell in (ours[0], raw[0])] == [(True, 100), (False, 50)]
    assert (ours[-1].best, ours[-1].share) == (False, None)  # RankMe


def test_the_supervised_baseline_stands_in_the_main_column() -> None:
    found = {"accuracy": 0.9, "shift_accuracy": 0.6, "train_accuracy": 1.0, "epochs": 3}
    shifted = {**ROW, "knn_shift": 0.4}
    results = {"rows": {"encoder": shifted}, "supervised": found}
    table = texts(results_rows(results))
    assert (table["supervised"][0], table["supervised"][-1]) == ("90.0", "60.0 (-30.0)")
    assert (table["encoder"][0], table["encoder"][-1]) == ("50.0", "40.0 (-10.0)")
    clips = {"encoder": {**shifted, "attentive": {"accuracy": 0.8, "shift_accuracy": 0.7}}}
    table = texts(results_rows({"rows": clips, "supervised": found}))
    assert table[""][:2] == ["Attentive probe", "kNN"]
    assert table["supervised"][:2] == ["90.0", None]
    assert table["encoder"][-1] == "70.0 (-10.0)"


def _spread(task: ProbeTask) -> dict[str, Any]:
    features_ND, labels_N, *_ = task.features
    within = [float(features_ND[labels_N == label].std(dim=0).mean()) for label in (0, 1)]
    return {"spread": max(within)}


SPREAD = Probe(
    run=_spread,
    columns=(
        Column(
            key="spread",
            name="Spread",
            better="lower",
            meaning="Largest deviation within a class.",
            text=lambda row: f"{row['spread']:.2f}",
        ),
    ),
)


def _set(scale: float) -> ProbeSet:
    """Forty rows of two classes, each uniform within `scale` of its centre."""
    rng = np.random.default_rng(0)
    labels_N = np.arange(40) % 2
    features = (labels_N[:, None] + scale * rng.uniform(-1, 1, (40, 6))).astype(np.float32)
    places, ids = np.zeros((40, 3), np.int64), np.zeros((40, 16), np.uint8)
    return ProbeSet("x", {"encoder": features}, labels_N, places, ids)


def test_a_probe_is_a_function_with_its_columns_and_one_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "PROBES", [*registry.PROBES, SPREAD])
    cfg = EvaluateConfig(checkpoint="x", data="y", test="z", probe_epochs=1)
    tight, loose = (
        registry.run_probes(
            ProbeTask(row="encoder", train=_set(scale), test=_set(scale), cfg=cfg, heads=1)
        )
        for scale in (0.1, 0.9)
    )
    table = table_of({"tight": tight, "loose": loose})
    assert [column.name for column in table.columns][-1] == "Spread"
    best = {name: cells[-1].best for name, cells in table.rows.items()}
    assert best == {"tight": True, "loose": False}
    # Uniform within s: a standard deviation of s / sqrt(3).
    assert tight["spread"] == pytest.approx(0.1 / np.sqrt(3), rel=0.15)
