"""A report's pictures: curves, charts, masks and colours of patches."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.pipelines.evaluation import Shards
from helpers.pipelines.fake_training import change, memory_batches, tiny_config
from models.image_size import Grid
from pipelines.config.data import MaskConfig
from pipelines.dataset.rows import load_labelled
from pipelines.evaluation.report import samples as report
from pipelines.evaluation.report.curves import SECTIONS, training_curves
from pipelines.evaluation.report.figures import line_chart, pca_pictures
from pipelines.evaluation.subject import load_subject
from pipelines.loading import read_tasks as reading
from pipelines.loading.loader import make_reader
from pipelines.training.state import new_state


def test_curves_are_grouped_and_only_those_that_were_logged(tmp_path: Path) -> None:
    rows = [
        {"step": s, "loss": 1 / s, "invariance": s, "sigreg": 2.0 * s, "tuned_lr": 1e-3 * s}
        for s in (1, 2, 3)
    ]
    rows[2]["variance"] = 1.0  # one reading makes no curve
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = training_curves(str(tmp_path))
    titles = {section: [curve["title"] for curve in curves] for section, curves in drawn.items()}
    assert titles == {
        "Training": ["Loss"],
        "Terms of the loss": ["Invariance", "SIGReg"],
        "Optimizer": ["Learning rate, tuned"],
    }
    assert drawn["Terms of the loss"][1]["last"] == "6"
    assert training_curves(None) == training_curves(str(tmp_path / "none")) == {}


def test_every_term_that_an_objective_logs_has_a_curve() -> None:
    """Runs a tiny batch of each objective, so that a new objective's terms are not forgotten."""
    known = {curve[0] for curves in SECTIONS.values() for curve in curves}
    for name in ("lejepa", "vicreg", "mae", "ijepa"):
        cfg = tiny_config(Path(), steps=4)
        cfg = change(cfg, objective={"name": name, "projector": (8, 8), "slices": 8})
        cfg = change(cfg, objective={"regularize": "target_pooled" if name == "lejepa" else None})
        objective = new_state(cfg, torch.device("cpu")).objective
        batch = next(memory_batches(cfg, rank=0, world_size=1, start_step=0, end_step=1))
        output = objective({key: batch[key] for key in objective.inputs})
        assert output.metrics.keys() <= known


def test_legacy_masks_shown_are_those_of_the_first_batch(
    cifar_shards: Shards, small_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load_subject(small_checkpoint)
    assert subject.config
    config = dataclasses.replace(subject.config, mask=MaskConfig(truncate="legacy"))
    subject = dataclasses.replace(subject, config=config)
    rows = load_labelled(cifar_shards[1], 16)
    drawn: list[tuple[int, np.ndarray]] = []
    for name, seen in (("context_picture", 0), ("target_picture", 1)):

        def picture(image: np.ndarray, ids: np.ndarray, grid: Grid, seen: int = seen) -> np.ndarray:
            drawn.append((seen, ids))
            return image

        monkeypatch.setattr(report, name, picture)
    assert len(report.masks(subject, rows)) == 8

    data = dataclasses.replace(config.data, train=cifar_shards[0])
    reader = make_reader(dataclasses.replace(config, data=data), 0, 1)
    trained = reading._masks(reader, np.zeros(0, np.uint64), 0, range(1), None)
    for seen, name in enumerate(("context_ids", "target_ids")):
        shown = np.stack([ids for which, ids in drawn if which == seen])
        np.testing.assert_array_equal(shown, trained[name][0][:8])
    assert "first" in report.mask_note(config)


def test_a_chart_spans_its_values_and_skips_what_is_not_a_number() -> None:
    chart = line_chart([(0, 1.0), (50, float("nan")), (100, 3.0)], "loss")
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.group(1).split())
    assert x0 < x1
    assert y0 > y1  # up is smaller in SVG
    assert "nan" not in chart
    assert line_chart([(1, float("inf"))], "loss") == ""
    assert "polyline" in line_chart([(5, 2.0), (6, 2.0)], "flat")
    assert "polyline" in line_chart([(5, 0.04), (6, 0.04000000000000001)], "nearly flat")


def test_pca_gives_like_patches_like_colours() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(4, size=(400, 16))  # four kinds of patch differ in three directions
    tokens = rng.normal(size=(4, 24))[kinds] * 5 + 0.01 * rng.normal(size=(400, 16, 24))
    pictures = pca_pictures(tokens, 5, Grid(4, 4))
    assert pictures.shape == (5, 4, 4, 3)
    flat, kinds = pictures.reshape(80, 3).astype(int), kinds[:5].ravel()
    means = np.stack([flat[kinds == k].mean(axis=0) for k in range(4)])
    within = max(np.abs(flat[kinds == k] - means[k]).max() for k in range(4))
    between = min(np.abs(means[a] - means[b]).max() for a in range(4) for b in range(a))
    assert between > 60
    assert within < between / 2
