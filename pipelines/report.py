"""The evaluation as one HTML file that needs nothing else: numbers, curves, pictures.

Shape suffixes: N images, T tokens, D width, K context tokens, M target blocks, Q queries.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup
from torch import Tensor

from models.preprocessing import Preprocessing
from models.vit import VisionTransformer
from pipelines.config import MaskConfig, PretrainConfig, to_json
from pipelines.features import decode_all, extract_features, read_places
from pipelines.figures import (
    context_picture,
    image_uri,
    line_chart,
    pca_pictures,
    target_picture,
)
from pipelines.masking import key_of, legacy_masks, multiblock_masks, sample_keys
from pipelines.probes import knn_predict, nearest
from pipelines.reading import STREAM_LEGACY
from pipelines.storage import local_copy, open_uri
from pipelines.tracking import METRICS, read_metrics

TEMPLATE = Path(__file__).with_name("report.html.j2")
QUERIES, NEIGHBOURS, MASKED = 10, 6, 8
PCA_SHOWN, PCA_FITTED, PCA_BATCH = 8, 256, 32
CURVES = (
    ("loss", "Loss", 1.0, "Falls when the encoder learns, and when it collapses."),
    ("rankme", "RankMe", 1.0, "Effective rank of pooled features; 1 is collapse."),
    ("knn", "Online kNN, %", 100.0, "On a small fixed bank of labelled images."),
    ("std", "Feature spread", 1.0, "Mean standard deviation per dimension."),
    ("cosine", "Mean pairwise cosine", 1.0, "1 means that all images look the same."),
    ("samples_per_s", "Images per second", 1.0, "Of the whole run."),
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The encoder under evaluation and where it comes from."""

    encoder: VisionTransformer
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    run_uri: str | None
    """Folder of the training run, where its metrics are; None for an artifact."""
    config: PretrainConfig | None
    """The run's configuration; None for an artifact."""


@dataclasses.dataclass(frozen=True)
class ProbeSet:
    """One labelled set as features, by row of the table, and where its images are.

    N rows.
    """

    uri: str
    features: dict[str, np.ndarray]
    labels_N: np.ndarray
    places_N3: np.ndarray


def write_report(
    results: dict[str, Any],
    subject: Subject,
    train: ProbeSet,
    test: ProbeSet,
    baseline: VisionTransformer,
) -> str:
    """Draws everything and fills the template.

    Args:
        results: what `pipelines.evaluate.evaluate` puts into results.json.
        subject: the encoder.
        train: the labelled set the probes learned from.
        test: the labelled set they were scored on; its images are shown.
        baseline: the randomly initialised encoder of the table.

    Returns:
        The HTML.
    """
    shown = read_places(test.uri, test.places_N3[_spread(test.labels_N, PCA_FITTED)])
    images_NCHW = decode_all(shown, subject.preprocessing)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        results=results,
        rows=_table(results),
        headline=_headline(results),
        curves=_curves(subject.run_uri),
        neighbours=_neighbours(results, subject, train, test),
        pca=_pca(subject, baseline, images_NCHW),
        masks=_masks(subject, shown, images_NCHW),
        mask_note=_mask_note(subject.config),
        provenance=json.dumps(results["provenance"], indent=2),
        config=to_json(subject.config) if subject.config else None,
    )


def _headline(results: dict[str, Any]) -> dict[str, str]:
    knn = {name: 100 * row["knn"] for name, row in results["rows"].items()}
    return {
        "knn": f"{knn['encoder']:.1f}",
        "over_random": f"{knn['encoder'] - knn['random_init']:+.1f}",
        "over_pixels": f"{knn['encoder'] - knn['raw_pixels']:+.1f}",
        "linear": f"{100 * results['rows']['encoder']['linear']['accuracy']:.1f}",
        "chance": f"{100 / len(results['classes']):.1f}",
    }


def _table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: a name and cells of (text, share of the column's largest)."""
    names = {"encoder": "Encoder", "random_init": "Random init", "raw_pixels": "Raw pixels"}
    columns = (
        lambda r: (f"{100 * r['knn']:.1f}", r["knn"]),
        lambda r: (f"{100 * r['linear']['accuracy']:.1f}", r["linear"]["accuracy"]),
        lambda r: _with_spread(r["few_shot_1pct"]),
        lambda r: _with_spread(r["few_shot_10"]),
        lambda r: (f"{r['rankme']:.1f} of {r['width']}" if "rankme" in r else "\u2013", None),
    )
    cells = {key: [column(results["rows"][key]) for column in columns] for key in names}
    best = [max((cells[key][i][1] or 0) for key in names) for i in range(len(columns))]
    return [
        {
            "name": name,
            "cells": [
                {
                    "text": text,
                    "width": None if value is None else round(100 * value / (best[i] or 1)),
                    "best": value is not None and value == best[i],
                }
                for i, (text, value) in enumerate(cells[key])
            ],
        }
        for key, name in names.items()
    ]


def _with_spread(score: dict[str, Any]) -> tuple[str, float]:
    return f"{100 * score['mean']:.1f} \u00b1 {100 * score['std']:.1f}", score["mean"]


def _curves(run_uri: str | None) -> list[dict[str, Any]]:
    if run_uri is None or not open_uri(run_uri)[0].exists(f"{open_uri(run_uri)[1]}/{METRICS}"):
        return []
    with local_copy(run_uri, METRICS) as folder:
        readings = read_metrics(folder / METRICS)
    curves = []
    for key, title, scale, note in CURVES:
        points = [(r["step"], r[key]) for r in readings if isinstance(r.get(key), int | float)]
        if len(points) >= 2:
            last = f"{scale * points[-1][1]:.4g}"
            chart = Markup(line_chart(points, title, scale=scale))
            curves.append({"title": title, "note": note, "chart": chart, "last": last})
    return curves


def _spread(labels_N: np.ndarray, count: int) -> np.ndarray:
    """Rows in class order round and round: the first of every class, the second of every class...

    The first as stored, not the best looking.
    """
    rank_N = np.zeros(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        rank_N[rows] = np.arange(len(rows))
    return np.lexsort((labels_N, rank_N))[:count]


def _neighbours(
    results: dict[str, Any], subject: Subject, train: ProbeSet, test: ProbeSet
) -> list[dict[str, Any]]:
    """Test images, each with its nearest training images by the encoder's features."""
    settings, classes = results["settings"], results["classes"]
    rows_Q = _spread(test.labels_N, QUERIES)
    bank_ND, query_QD = train.features["encoder"], test.features["encoder"][rows_Q]
    similarity_QK, index_QK = nearest(bank_ND, query_QD, NEIGHBOURS)
    votes = {"k": settings["knn_k"], "temperature": settings["knn_temperature"]}
    predicted_Q = knn_predict(bank_ND, train.labels_N, query_QD, **votes)
    queries = _pictures(subject, test, rows_Q)
    found = _pictures(subject, train, index_QK.flatten().numpy())
    groups = []
    for q, row in enumerate(rows_Q):
        truth, guess = int(test.labels_N[row]), int(predicted_Q[q])
        neighbours = [
            {
                "image": found[q * index_QK.shape[1] + k],
                "label": classes[label],
                "right": label == truth,
                "similarity": f"{float(similarity_QK[q, k]):.3f}",
            }
            for k, label in enumerate(train.labels_N[index_QK[q].numpy()])
        ]
        query = {"image": queries[q], "label": classes[truth], "right": guess == truth}
        groups.append({**query, "guess": classes[guess], "neighbours": neighbours})
    return groups


def _pictures(subject: Subject, part: ProbeSet, rows: np.ndarray) -> list[str]:
    table = read_places(part.uri, part.places_N3[rows])
    return [image_uri(image) for image in _as_hwc(decode_all(table, subject.preprocessing))]


def _as_hwc(images_NCHW: Tensor) -> np.ndarray:
    return images_NCHW.permute(0, 2, 3, 1).numpy()


def _pca(
    subject: Subject, baseline: VisionTransformer, images_NCHW: Tensor
) -> list[dict[str, str]]:
    maps = []
    for encoder in (subject.encoder, baseline):
        tokens_NTD = extract_features(
            encoder,
            subject.preprocessing,
            images_NCHW,
            batch_size=PCA_BATCH,
            pooling="patches",
        )
        maps.append(pca_pictures(tokens_NTD, PCA_SHOWN))
    return [
        {"image": image_uri(image), "encoder": image_uri(ours), "random": image_uri(random)}
        for image, ours, random in zip(_as_hwc(images_NCHW), *maps, strict=False)
    ]


def _masks(subject: Subject, rows: pa.Table, images_NCHW: Tensor) -> list[dict[str, str]]:
    config = subject.config.mask if subject.config else MaskConfig()
    seed, grid = (subject.config.run.seed if subject.config else 0), subject.encoder.grid
    ids = rows["sample_id"].to_pylist()[:MASKED]
    if grid < 2:
        return []
    if subject.config and config.truncate == "legacy":
        # Drawn for the whole batch, whose shortest lists decide how much of every mask is left.
        key, batch = key_of(seed, STREAM_LEGACY, 0, 0), subject.config.data.batch_size
        masks = legacy_masks(key, batch, grid, config)
        context_BK, targets_BMT = masks[0][:MASKED], masks[1][:MASKED]
    else:
        context_BK, targets_BMT = multiblock_masks(sample_keys(ids, seed, 0), grid, config)
    return [
        {
            "image": image_uri(image),
            "context": image_uri(context_picture(image, context_K, grid)),
            "targets": image_uri(target_picture(image, targets_MT, grid)),
        }
        for image, context_K, targets_MT in zip(
            _as_hwc(images_NCHW), context_BK, targets_BMT, strict=False
        )
    ]


def _mask_note(config: PretrainConfig | None) -> str:
    if config is None:
        return "default settings; an artifact has none"
    if config.mask.truncate == "legacy":
        return "the run's own settings; legacy masks belong to places in a batch, here its first"
    return "the run's own settings"
