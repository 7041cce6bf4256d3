"""Curves of a training run, for its report: what every run logs, and what its objective and optimizer
log besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipelines.evaluation.report.figures import line_chart
from pipelines.runs.run_folder import METRICS, read_metrics
from pipelines.runtime.uris import local_copy, open_uri

Curve = tuple[str, str, float, str]
"""Name in metrics.jsonl, title, factor, note."""

COMMON: tuple[Curve, ...] = (
    ("loss", "Loss", 1.0, "Falls when the encoder learns, and when it collapses."),
    ("rankme", "RankMe", 1.0, "Effective rank of pooled features; 1 is collapse."),
    ("knn", "Online kNN, %", 100.0, "On a small fixed bank of labelled samples."),
    ("fixed_rankme", "RankMe, fixed samples", 1.0, "Compares over runs of one encoder shape."),
    ("lidar", "LiDAR, fixed samples", 1.0, "Directions that tell samples from their views."),
    ("std", "Feature spread", 1.0, "Mean standard deviation per dimension."),
    ("cosine", "Mean pairwise cosine", 1.0, "1 means that all samples look the same."),
    ("embedded_rankme", "RankMe of embeddings", 1.0, "Behind the projector (LeJEPA, VICReg)."),
    ("embedded_std", "Spread of embeddings", 1.0, "Both losses ask for 1; below 0.1 is collapse."),
    ("samples_per_s", "Samples per second", 1.0, "Of the whole run."),
)
OBJECTIVE: tuple[Curve, ...] = (
    ("invariance", "Invariance", 1.0, "How far views of one sample lie apart."),
    ("sigreg", "SIGReg", 1.0, "Distance of the embeddings from a normal distribution."),
    ("variance", "Variance term", 1.0, "How far deviations fall short of 1 (VICReg)."),
    ("covariance", "Covariance term", 1.0, "What dimensions tell twice (VICReg)."),
    ("regularizer", "Regularizer", 1.0, "SIGReg of the tensor of --objective.regularize."),
    ("loss_0", "Loss, short range", 1.0, "Of the first mask generator."),
    ("loss_1", "Loss, long range", 1.0, "Of the second mask generator."),
)
OPTIMIZER: tuple[Curve, ...] = (
    ("lr", "Learning rate", 1.0, "As scheduled."),
    ("tuned_lr", "Learning rate, tuned", 1.0, "The schedule times the optimizer's own factor."),
    ("wd", "Weight decay", 1.0, "As scheduled."),
    (
        "tuned_weight_decay",
        "Weight decay, tuned",
        1.0,
        "The schedule times the optimizer's factor.",
    ),
    ("tuned_beta1", "Beta 1, tuned", 1.0, "Decay rate of the gradient's average."),
    ("tuned_beta2", "Beta 2, tuned", 1.0, "Decay rate of the squared gradient's average."),
    ("tuned_eps", "Epsilon, tuned", 1.0, "Floor of the update's denominator."),
    ("grad_norm", "Gradient norm", 1.0, "Before clipping."),
)
SECTIONS: Mapping[str, tuple[Curve, ...]] = {
    "Training": COMMON,
    "Terms of the loss": OBJECTIVE,
    "Optimizer": OPTIMIZER,
}


def training_curves(run_uri: str | None) -> dict[str, list[dict[str, Any]]]:
    """By section, the curves that a run's metrics.jsonl has two readings or more of; {} without one."""
    if run_uri is None or not open_uri(run_uri)[0].exists(f"{open_uri(run_uri)[1]}/{METRICS}"):
        return {}
    with local_copy(run_uri, METRICS) as folder:
        readings = read_metrics(folder / METRICS)
    drawn = {
        section: [found for curve in curves if (found := _draw(curve, readings))]
        for section, curves in SECTIONS.items()
    }
    return {section: curves for section, curves in drawn.items() if curves}


def _draw(curve: Curve, readings: list[dict[str, Any]]) -> dict[str, Any] | None:
    key, title, scale, note = curve
    points = [(r["step"], r[key]) for r in readings if isinstance(r.get(key), int | float)]
    if len(points) < 2:
        return None
    chart = Markup(line_chart(points, title, scale=scale))
    return {"title": title, "note": note, "chart": chart, "last": f"{scale * points[-1][1]:.4g}"}
