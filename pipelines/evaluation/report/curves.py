"""Curves of a training run for its report: the readings that every run logs, and those that its
objective and its optimizer add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipelines.evaluation.report.figures import line_chart
from pipelines.runs.run_folder import METRICS, read_metrics
from pipelines.runtime.uris import local_copy, open_uri

Curve = tuple[str, str, float, str]
"""Key in metrics.jsonl, title, factor for the value, and a note for the reader."""

COMMON: tuple[Curve, ...] = (
    ("loss", "Loss", 1.0, "Falls when the encoder learns, but also when it collapses."),
    (
        "rankme",
        "RankMe",
        1.0,
        "Effective number of directions of the pooled features; 1 means collapse.",
    ),
    ("knn", "Online kNN, %", 100.0, "kNN accuracy against a small fixed set of labelled samples."),
    (
        "fixed_rankme",
        "RankMe, fixed samples",
        1.0,
        "Always on the same samples, so runs of one encoder shape compare.",
    ),
    (
        "lidar",
        "LiDAR, fixed samples",
        1.0,
        "Number of directions in which samples differ more than views of one sample.",
    ),
    ("std", "Feature spread", 1.0, "Standard deviation of the features, averaged over dimensions."),
    (
        "cosine",
        "Mean pairwise cosine",
        1.0,
        "Similarity of two samples' features; 1 means that all look the same.",
    ),
    (
        "embedded_rankme",
        "RankMe of embeddings",
        1.0,
        "RankMe after the projector (LeJEPA, VICReg).",
    ),
    (
        "embedded_std",
        "Spread of embeddings",
        1.0,
        "LeJEPA and VICReg aim at 1; below 0.1 the encoder has collapsed.",
    ),
    ("samples_per_s", "Samples per second", 1.0, "Training throughput of all workers together."),
)
OBJECTIVE: tuple[Curve, ...] = (
    (
        "invariance",
        "Invariance",
        1.0,
        "Distance between the embeddings of two views of one sample.",
    ),
    ("sigreg", "SIGReg", 1.0, "Distance of the embeddings from a normal distribution."),
    ("variance", "Variance term", 1.0, "How far standard deviations fall short of 1 (VICReg)."),
    ("covariance", "Covariance term", 1.0, "How much the dimensions repeat each other (VICReg)."),
    ("regularizer", "Regularizer", 1.0, "SIGReg of the tensor that --objective.regularize names."),
    ("loss_0", "Loss, short range", 1.0, "Loss on the masks of the first generator."),
    ("loss_1", "Loss, long range", 1.0, "Loss on the masks of the second generator."),
)
OPTIMIZER: tuple[Curve, ...] = (
    ("lr", "Learning rate", 1.0, "The value that the schedule sets."),
    (
        "tuned_lr",
        "Learning rate, tuned",
        1.0,
        "The scheduled value times the optimizer's own factor.",
    ),
    ("wd", "Weight decay", 1.0, "The value that the schedule sets."),
    (
        "tuned_weight_decay",
        "Weight decay, tuned",
        1.0,
        "The scheduled value times the optimizer's own factor.",
    ),
    ("tuned_beta1", "Beta 1, tuned", 1.0, "Decay rate of the running mean of gradients."),
    ("tuned_beta2", "Beta 2, tuned", 1.0, "Decay rate of the running mean of squared gradients."),
    ("tuned_eps", "Epsilon, tuned", 1.0, "Smallest denominator of an update."),
    ("grad_norm", "Gradient norm", 1.0, "Norm of the gradient before it is clipped."),
)
SECTIONS: Mapping[str, tuple[Curve, ...]] = {
    "Training": COMMON,
    "Terms of the loss": OBJECTIVE,
    "Optimizer": OPTIMIZER,
}


def training_curves(run_uri: str | None) -> dict[str, list[dict[str, Any]]]:
    """Draws, by section, every curve of which a run's metrics.jsonl has at least two readings.

    Returns:
        Title, note, SVG and last reading of each curve; {} where there is no metrics.jsonl.
    """
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
