"""Probes read on another encoder's features: those of the registry, whichever they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes import registry
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask, Score
from pipelines.evaluation.probes.replaced import ADAPTED, OLD, RANDOM, read_replaced
from pipelines.evaluation.report.adaptation import as_html

CFG = EvaluateConfig(checkpoint="", data="", test="", probe_epochs=1)


def _threshold(task: ProbeTask) -> dict[str, Any]:
    """Classifies by the sign of the first dimension; learns nothing."""
    parts = {"accuracy": task.features[2:], "elsewhere": task.shifted_features}
    return {
        "threshold": {
            key: None if part is None else float(np.mean((part[0][:, 0].numpy() > 0) == part[1]))
            for key, part in parts.items()
        }
    }


THRESHOLD = Probe(
    run=_threshold,
    score=Score("threshold.accuracy", "threshold.elsewhere"),
    columns=(Column(key="threshold.accuracy", name="Sign", meaning="Sign of a dimension."),),
)


def part(count: int, sign: float) -> ProbeSet:
    labels_N = np.arange(count) % 2
    features = np.ones((count, 2), np.float32)
    features[:, 0] = sign * (2 * labels_N - 1)
    everyone = {OLD: features, ADAPTED: -features, RANDOM: np.abs(features)}
    ids = np.zeros((count, 16), np.uint8)
    return ProbeSet("", everyone, labels_N, np.zeros((count, 3), np.int64), ids)


def test_a_probe_of_the_registry_is_read_and_shown_by_its_own_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = [part(40, 1), part(20, 1), part(30, -1)]
    before = read_replaced(sets, CFG, heads=1)
    assert before["old_footage"]["old"].keys() == {"knn", "linear"}
    monkeypatch.setattr(registry, "PROBES", [*registry.PROBES, THRESHOLD])
    found = read_replaced(sets, CFG, heads=1)
    read = {
        footage: {row: accuracies["threshold"] for row, accuracies in rows.items()}
        for footage, rows in found.items()
    }
    old = {"old": 1.0, "adapted": 0.0, "refitted": 0.0, "random": 0.5}
    assert read["old_footage"] == old
    assert read["new_footage"] == {
        row: 0.5 if row == "random" else 1 - of for row, of in old.items()
    }
    for footage, rows in before.items():
        for row, accuracies in rows.items():
            assert accuracies.items() < found[footage][row].items()
    results = {"run": "r", "from": {"checkpoint": "c", "step": 1}, "probes": found, "drift": {}}
    html = as_html(results)
    assert "<th>Linear probe</th><th>Sign</th>" in html
    assert "<td>0.0 (-100.0)</td></tr>" in html
