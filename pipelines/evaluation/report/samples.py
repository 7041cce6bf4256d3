"""The sections of the report that show samples: nearest neighbours, patch colours, and masks.

Shape suffixes: N images or clips, T tokens, D width, Q queries, K neighbours, H and W pixels,
C channels, F frames.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from models.encoders.input_batch import InputBatch
from models.encoders.vit import VisionTransformer
from models.image_size import Grid
from models.keyed_random.arrays import key_of, sample_keys
from models.keyed_random.streams import PlanStream
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.dataset.rows import read_places
from pipelines.evaluation.features import decode_all, extract_features, preprocessing_of
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.knn import knn_predict, nearest
from pipelines.evaluation.report.figures import (
    context_picture,
    masked_clip,
    pca_pictures,
    picture_uri,
    target_picture,
    without,
)
from pipelines.evaluation.subject import Subject
from pipelines.loading.masks.layouts import Layout
from pipelines.loading.masks.maskers import make_masker

QUERIES, NEIGHBOURS, MASKED = 10, 6, 8
PCA_SHOWN, PCA_FITTED, PCA_BATCH = 8, 256, 32


def shown_rows(test: ProbeSet) -> pa.Table:
    """Reads the test samples whose patch colours and masks are drawn, class by class in turn."""
    return read_places(test.uri, test.places_N3[_spread(test.labels_N, PCA_FITTED)])


def _spread(labels_N: np.ndarray, count: int) -> np.ndarray:
    """Picks rows class by class in turn: the first of every class, then the second of every class.

    They are the first as stored, not the best looking.
    """
    rank_N = np.zeros(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        rank_N[rows] = np.arange(len(rows))
    return np.lexsort((labels_N, rank_N))[:count]


def neighbours(
    results: dict[str, Any], subject: Subject, train: ProbeSet, test: ProbeSet
) -> list[dict[str, Any]]:
    """Finds the nearest training samples of some test samples by the encoder's features."""
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
        found_K = [
            {
                "image": found[q * index_QK.shape[1] + k],
                "label": classes[label],
                "right": label == truth,
                "similarity": f"{float(similarity_QK[q, k]):.3f}",
            }
            for k, label in enumerate(train.labels_N[index_QK[q].numpy()])
        ]
        query = {"image": queries[q], "label": classes[truth], "right": guess == truth}
        groups.append({**query, "guess": classes[guess], "neighbours": found_K})
    return groups


def _pictures(subject: Subject, part: ProbeSet, rows: np.ndarray) -> list[str]:
    table = read_places(part.uri, part.places_N3[rows])
    decoded = decode_all(table, subject.preprocessing, subject.sampler)
    return [picture_uri(sample) for sample in channels_last(decoded)]


def channels_last(samples: InputBatch) -> list[np.ndarray]:
    """Returns images as [H, W, C] and clips as [F, H, W, C]."""
    return [picture.movedim(0, -1).numpy() for picture in samples.pictures()]


def patch_colours(
    subject: Subject, baseline: VisionTransformer, samples: InputBatch
) -> list[list[str]]:
    """Draws samples beside their patch features by the encoder and by the baseline.

    Where samples have grids of their own, only those with the commonest grid are drawn.
    """
    samples, grid = of_one_grid(subject, samples)
    maps = []
    for encoder in (subject.encoder, baseline):
        tokens_NTD = extract_features(
            encoder,
            subject.preprocessing,
            samples,
            batch_size=PCA_BATCH * (subject.sampler.frames if subject.sampler else 1),
            pooling="patches",
        )
        maps.append(pca_pictures(by_step(tokens_NTD, grid), PCA_SHOWN, grid))
    if subject.sampler:  # as long as the clip they stand beside
        maps = [pictures.repeat(subject.encoder.tubelet, axis=1) for pictures in maps]
    return [
        [picture_uri(picture) for picture in row]
        for row in zip(channels_last(samples[:PCA_SHOWN]), *maps, strict=True)
    ]


def of_one_grid(subject: Subject, samples: InputBatch) -> tuple[InputBatch, Grid]:
    """Returns the samples that have the commonest grid, and this grid."""
    grid = subject.encoder.grid
    grid = grid if subject.sampler else grid._replace(tubes=1)
    if samples.grids_B2 is not None:
        (rows, columns), _ = Counter(map(tuple, samples.grids_B2.tolist())).most_common(1)[0]
        samples = samples[(samples.grids_B2 == torch.tensor([rows, columns])).all(1)]
        grid = grid._replace(rows=rows, columns=columns)
    return samples, grid


def by_step(tokens_NTD: np.ndarray, grid: Grid) -> np.ndarray:
    """Removes the places of a time step that a grid does not have, from tokens [N, T, D]."""
    N, T, D = tokens_NTD.shape
    steps = tokens_NTD.reshape(N, grid.tubes, T // grid.tubes, D)[:, :, : grid.per_step]
    return steps.reshape(N, -1, D)


def masks(subject: Subject, rows: pa.Table) -> list[list[str]]:
    """Draws every sample beside what the encoder saw of it in epoch 0.

    Samples are fitted as in training, and what training leaves out is black, whatever the
    evaluation leaves out.
    """
    config, encoder = subject.config or _default_config(subject), subject.encoder
    masker = make_masker(config)
    if min(encoder.grid[:2]) < 2 or config.masks == "none":
        return []
    rows = rows.slice(0, MASKED)
    trained = preprocessing_of(config.model) if subject.config else subject.preprocessing
    samples, ids = decode_all(rows, trained, subject.sampler), rows["sample_id"].to_pylist()
    if masker.legacy:
        # Drawn for the whole batch, whose shortest lists decide how much of every mask is left.
        key = key_of(config.run.seed, PlanStream.LEGACY_MASKS, 0, 0)
        drawn = masker.for_batch(key, config.data.batch_size)
    else:
        drawn = masker.for_samples(sample_keys(ids, config.run.seed, 0), _layout(samples))
    shown = []
    for row, sample in enumerate(channels_last(samples)):
        grid, kept_M = encoder.grid, None
        if samples.grids_B2 is not None and samples.kept_BM is not None:
            high, wide = samples.grids_B2[row].tolist()
            grid = grid._replace(rows=high, columns=wide)
            kept_M = samples.kept_BM[row, : grid.per_step].numpy()
        mine = {name: _in_grid(own[row], encoder.grid, grid) for name, own in drawn.items()}
        pictures = (sample, *_masked(sample, mine, grid, encoder))
        shown.append([picture_uri(without(picture, kept_M, grid)) for picture in pictures])
    return shown


def _layout(samples: InputBatch) -> Layout | None:
    if samples.grids_B2 is None or samples.kept_BM is None:
        return None
    return Layout(samples.grids_B2.numpy(), samples.kept_BM.numpy())


def _in_grid(ids: np.ndarray, numbered: Grid, grid: Grid) -> np.ndarray:
    """Renumbers tokens: time steps of `grid` may be shorter than those of `numbered`."""
    numbers: np.ndarray = ids // numbered.per_step * grid.per_step + ids % numbered.per_step
    return numbers


def _masked(
    sample: np.ndarray, masks: dict[str, np.ndarray], grid: Grid, encoder: VisionTransformer
) -> list[np.ndarray]:
    """Draws an image's (first) context and its targets, or a clip's mask by each generator."""
    if sample.ndim == 3:
        return [
            context_picture(sample, np.atleast_2d(masks["context_ids"])[0], grid),
            target_picture(sample, masks["target_ids"], grid),
        ]
    return [
        masked_clip(
            *(sample, masks[f"context_ids_{g}"], masks[f"target_ids_{g}"]),
            *(grid, encoder.tubelet),
        )
        for g in range(len(masks) // 2)
    ]


def _default_config(subject: Subject) -> PretrainConfig:
    """Builds default mask settings for an artifact's encoder, which does not store its own."""
    encoder = subject.encoder
    model = ModelConfig(
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
        frames=encoder.frames if subject.sampler else 1,
        tubelet=encoder.tubelet if subject.sampler else 1,
        fit=subject.preprocessing.fit,
        exclude=subject.preprocessing.exclude,
    )
    name = "vjepa" if subject.sampler else "ijepa"
    return PretrainConfig(model=model, objective=ObjectiveConfig(name=name))


def mask_note(config: PretrainConfig | None) -> str:
    """Says whose mask settings the report shows, and on what."""
    if config is None:
        return "with the default settings, because an artifact does not store its own"
    if make_masker(config).legacy:
        return (
            "with the run's own settings; legacy masks belong to positions in a batch, and the "
            "first ones are shown"
        )
    if config.model.partial:
        return (
            "with the run's own settings, here on all that the fit shows, in training on its "
            "crops; patches that touch a region left out are black"
        )
    return "with the run's own settings"
