"""The evaluation as one HTML file that needs nothing else: numbers, curves, pictures.

Shape suffixes: N images or clips, T tokens, D width, K context tokens, M target blocks, Q queries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from torch import Tensor

from models.encoders.vit import VisionTransformer
from models.keyed_random.arrays import key_of, sample_keys
from models.keyed_random.streams import PlanStream
from pipelines.config.as_json import to_json
from pipelines.config.train import ModelConfig, ObjectiveConfig, PretrainConfig
from pipelines.dataset.rows import read_places
from pipelines.evaluation.features import decode_all, extract_features
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes import knn_predict, nearest
from pipelines.evaluation.report.comparison import compared_rows
from pipelines.evaluation.report.curves import training_curves
from pipelines.evaluation.report.figures import (
    context_picture,
    masked_clip,
    pca_pictures,
    picture_uri,
    target_picture,
)
from pipelines.evaluation.subject import Subject
from pipelines.loading.masks.maskers import make_masker

Column = Callable[[Mapping[str, Any]], tuple[str, float | None]]

TEMPLATE = Path(__file__).with_name("page.html.j2")
NAMES = {
    "encoder": "encoder",
    "random_init": "random init",
    "single_frame": "single frame",
    "raw_pixels": "raw pixels",
    "supervised": "supervised",
}
"""Rows of the table of results."""
QUERIES, NEIGHBOURS, MASKED = 10, 6, 8
PCA_SHOWN, PCA_FITTED, PCA_BATCH = 8, 256, 32


def write_report(
    results: dict[str, Any],
    subject: Subject,
    train: ProbeSet,
    test: ProbeSet,
    baseline: VisionTransformer,
    compared: Sequence[dict[str, Any]] = (),
) -> str:
    """Draws everything and fills the template.

    Args:
        results: what `pipelines.evaluate.evaluate` puts into results.json.
        subject: the encoder.
        train: the labelled set the probes learned from.
        test: the labelled set they were scored on; its images are shown.
        baseline: the randomly initialised encoder of the table.
        compared: results of other evaluations, to stand beside.

    Returns:
        The HTML.
    """
    shown = read_places(test.uri, test.places_N3[_spread(test.labels_N, PCA_FITTED)])
    pixels = decode_all(shown, subject.preprocessing, subject.sampler)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        results=results,
        rows=_table(
            {NAMES[key].capitalize(): row for key, row in results["rows"].items()},
            results.get("supervised"),
        ),
        compared=_table(compared_rows(results, compared)) if compared else [],
        headline=_headline(results),
        sections=training_curves(subject.run_uri),
        neighbours=_neighbours(results, subject, train, test),
        pca=_pca(subject, baseline, pixels),
        masks=_masks(subject, shown, pixels),
        noun="clip" if subject.sampler else "image",
        counts=[len(part.labels_N) for part in (train, test)],
        columns=[name for name, _ in _columns(results["rows"])],
        mask_note=_mask_note(subject.config),
        provenance=json.dumps(results["provenance"], indent=2),
        config=to_json(subject.config) if subject.config else None,
    )


def _columns(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Column]]:
    """Columns of the table: a name, and a row's (text, value or None where there is no best)."""
    columns: list[tuple[str, Column]] = [
        ("kNN", lambda r: (_percent(r["knn"]), r["knn"])),
        ("Linear probe", lambda r: _accuracy(r["linear"])),
        ("1% of labels", lambda r: _with_spread(r["few_shot_1pct"])),
        ("10 per class", lambda r: _with_spread(r["few_shot_10"])),
        (
            "RankMe",
            lambda r: (f"{r['rankme']:.1f} of {r['width']}" if "rankme" in r else "\u2013", None),
        ),
    ]
    if all("attentive" in row for row in rows.values()):
        columns.insert(0, ("Attentive probe", lambda r: _accuracy(r["attentive"])))
    if all(row.get("knn_shift") is not None for row in rows.values()):
        columns.insert(1, ("Shifted", lambda r: _shifted(*main_score(r))))
    return columns


def main_score(row: Mapping[str, Any]) -> tuple[float, float]:
    """A row's main accuracy, attentive probe or kNN, on the test set and on the shifted one."""
    if "attentive" in row:
        return row["attentive"]["accuracy"], row["attentive"]["shift_accuracy"]
    return row["knn"], row["knn_shift"]


def _shifted(score: float, shifted: float) -> tuple[str, float]:
    return f"{_percent(shifted)} ({100 * (shifted - score):+.1f})", shifted


def _headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a number and what it is: first the main probe against every baseline."""
    rows = results["rows"]
    attentive = "attentive" in rows["encoder"]
    score = {name: 100 * main_score(row)[0] for name, row in rows.items()}
    if found := results.get("supervised"):
        score["supervised"] = 100 * found["accuracy"]
    probe = "attentive probe" if attentive else "kNN accuracy"
    other = rows["encoder"]["knn"] if attentive else rows["encoder"]["linear"]["accuracy"]
    return [
        (f"{score['encoder']:.1f}%", f"{probe} of frozen features"),
        *(
            (f"{score['encoder'] - score[name]:+.1f}", f"points over {NAMES[name]}")
            for name in score
            if name != "encoder"
        ),
        (f"{_percent(other)}%", "kNN" if attentive else "linear probe"),
        (f"{_percent(1 / len(results['classes']))}%", "chance"),
    ]


def _table(
    rows: Mapping[str, Mapping[str, Any]], supervised: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Rows of a table: a name and cells of (text, share of the column's largest)."""
    named = _columns(rows)
    columns = [column for _, column in named]
    cells = {name: [column(row) for column in columns] for name, row in rows.items()}
    if supervised:
        cells["Supervised"] = _supervised_cells(supervised, named)
    best = [max((row[i][1] or 0) for row in cells.values()) for i in range(len(columns))]
    return [
        {
            "name": name,
            "cells": [
                {
                    "text": text,
                    "width": None if value is None else round(100 * value / (best[i] or 1)),
                    "best": value is not None and value == best[i],
                }
                for i, (text, value) in enumerate(row)
            ],
        }
        for name, row in cells.items()
    ]


def _supervised_cells(
    found: dict[str, Any], columns: list[tuple[str, Column]]
) -> list[tuple[str, float | None]]:
    """The supervised baseline's cells: it has an accuracy, and no features to probe."""
    cells: list[tuple[str, float | None]] = [("\u2013", None)] * len(columns)
    cells[0] = _accuracy(found)
    if found["shift_accuracy"] is not None:
        cells[1] = _shifted(found["accuracy"], found["shift_accuracy"])
    return cells


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _accuracy(probe: dict[str, Any]) -> tuple[str, float]:
    return _percent(probe["accuracy"]), probe["accuracy"]


def _with_spread(score: dict[str, Any]) -> tuple[str, float]:
    return f"{100 * score['mean']:.1f} \u00b1 {100 * score['std']:.1f}", score["mean"]


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
    pixels = decode_all(table, subject.preprocessing, subject.sampler)
    return [picture_uri(sample) for sample in _channels_last(pixels)]


def _channels_last(pixels: Tensor) -> np.ndarray:
    """[N, H, W, C] of images, [N, F, H, W, C] of clips."""
    return pixels.movedim(1, -1).numpy()


def _pca(subject: Subject, baseline: VisionTransformer, pixels: Tensor) -> list[list[str]]:
    """Every sample with its patch features by the encoder and by the baseline, as pictures."""
    steps = subject.encoder.tubes if subject.sampler else 1
    maps = []
    for encoder in (subject.encoder, baseline):
        tokens_NTD = extract_features(
            encoder,
            subject.preprocessing,
            pixels,
            batch_size=PCA_BATCH * (subject.sampler.frames if subject.sampler else 1),
            pooling="patches",
        )
        maps.append(pca_pictures(tokens_NTD, PCA_SHOWN, steps))
    if subject.sampler:  # as long as the clip they stand beside
        maps = [pictures.repeat(subject.encoder.tubelet, axis=1) for pictures in maps]
    return [
        [picture_uri(picture) for picture in row]
        for row in zip(_channels_last(pixels), *maps, strict=False)
    ]


def _masks(subject: Subject, rows: pa.Table, pixels: Tensor) -> list[list[str]]:
    """Every sample and what the encoder saw of it in epoch 0, as pictures."""
    encoder, config = subject.encoder, subject.config or _default_config(subject)
    ids = rows["sample_id"].to_pylist()[:MASKED]
    masker = make_masker(config)
    if encoder.grid < 2 or config.masks == "none":
        return []
    if masker.legacy:
        # Drawn for the whole batch, whose shortest lists decide how much of every mask is left.
        key = key_of(config.run.seed, PlanStream.LEGACY_MASKS, 0, 0)
        masks = masker.for_batch(key, config.data.batch_size)
    else:
        masks = masker.for_samples(sample_keys(ids, config.run.seed, 0))
    shown = []
    for row, sample in enumerate(_channels_last(pixels)[: len(ids)]):
        mine = {name: ids[row] for name, ids in masks.items()}
        shown.append([picture_uri(p) for p in (sample, *_masked(sample, mine, encoder))])
    return shown


def _masked(
    sample: np.ndarray, masks: dict[str, np.ndarray], encoder: VisionTransformer
) -> list[np.ndarray]:
    """Of an image, its (first) context and its targets; of a clip, each generator's mask."""
    if sample.ndim == 3:
        return [
            context_picture(sample, np.atleast_2d(masks["context_ids"])[0], encoder.grid),
            target_picture(sample, masks["target_ids"], encoder.grid),
        ]
    return [
        masked_clip(
            *(sample, masks[f"context_ids_{g}"], masks[f"target_ids_{g}"]),
            *(encoder.grid, encoder.tubelet),
        )
        for g in range(len(masks) // 2)
    ]


def _default_config(subject: Subject) -> PretrainConfig:
    """Default masks on this encoder's grid, for an artifact, which does not know its own."""
    encoder = subject.encoder
    model = ModelConfig(
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
        frames=encoder.frames if subject.sampler else 1,
        tubelet=encoder.tubelet if subject.sampler else 1,
    )
    name = "vjepa" if subject.sampler else "ijepa"
    return PretrainConfig(model=model, objective=ObjectiveConfig(name=name))


def _mask_note(config: PretrainConfig | None) -> str:
    if config is None:
        return "default settings; an artifact has none"
    if make_masker(config).legacy:
        return "the run's own settings; legacy masks belong to places in a batch, here its first"
    return "the run's own settings"
