"""The features of a labelled set by every featurizer, computed in one pass over the samples.

Shape suffixes: N rows, B of one batch, C channels, F frames of a clip, H and W pixels, T tokens, D
feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.encoders.input_batch import InputBatch
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from pipelines.dataset.rows import LABELLED, PLACE, Wanted, iter_labelled, table_labels
from pipelines.dataset.shards import sample_ids_array
from pipelines.evaluation.features import (
    Featurizer,
    Pooling,
    compute_features,
    decode_batches,
    encoder_features,
    pixel_features,
    single_frame,
    thumbnail_features,
    tubelet_features,
)
from pipelines.evaluation.near_duplicates import compare_thumbnails
from pipelines.loading.clips import ClipSampler

SETS = ("data", "test", "shift_test")
"""The sets of an evaluation, named as their flags."""
TOKEN_BYTES = 8 * 2**30
"""Upper limit in bytes for the frozen tokens that attentive probes keep in memory."""
TUBELETS = "raw_tubelets"  # raw pixels as tokens, for the attentive probe
# As they are, for the supervised baseline; the two others only where tokens may be left out.
PIXELS, GRIDS, KEPT = "pixels", "grids", "kept"
THUMBNAILS = "thumbnails"  # to find near duplicates


@dataclasses.dataclass(frozen=True)
class ProbeSet:
    """One labelled set of N samples: features by row of the table, and where samples are stored."""

    uri: str
    features: dict[str, np.ndarray]
    labels_N: np.ndarray
    places_N3: np.ndarray
    ids_N16: np.ndarray
    tokens: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Input of the attentive probes, float16 [N, T, D] by row of the table, NaN where a sample has
    no token; empty for images."""
    pixels: InputBatch | None = None
    """The samples for the supervised baseline; None without one."""
    numbers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Numbers to read from the features, fp64 [N] by name; not finite where there is none."""
    left_out: int = 0
    """Samples that are not here because their label is no finite number."""
    thumbnails_NP: np.ndarray | None = None
    """Grey thumbnails (`features.thumbnail_features`); None unless near duplicates are sought."""
    duplicates: dict[str, float] | None = None
    """What `NearDuplicates.report` says of those left out; None if they were not sought."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which rows of a set are used, and how their labels are read."""

    wanted: Wanted = LABELLED
    read: Callable[[pa.Table], np.ndarray] = table_labels
    numbers: Mapping[str, Callable[[pa.Table], np.ndarray]] = dataclasses.field(
        default_factory=dict
    )
    """How the values of each number are read."""


def probe_featurizers(
    encoder: VisionTransformer,
    baseline: VisionTransformer,
    prep: Preprocessing,
    *,
    clips: bool,
    attentive: bool,
    pixels: bool,
    thumbnails: bool = False,
) -> dict[str, Featurizer]:
    """Builds the featurizers by row of the table.

    With `attentive` they return all tokens, which `probe_set` averages for the other probes.
    `pixels` and `thumbnails` add those of `ProbeSet.pixels` and `ProbeSet.thumbnails_NP`.
    """
    pooling: Pooling = "patches" if attentive else "mean"
    encoded = encoder_features(encoder, prep, pooling=pooling)
    featurizers = {
        "encoder": encoded,
        "random_init": encoder_features(baseline, prep, pooling=pooling),
    }
    if clips:
        featurizers["single_frame"] = single_frame(encoded)
    featurizers["raw_pixels"] = pixel_features(prep)
    if attentive:
        featurizers[TUBELETS] = tubelet_features(encoder, prep)
    if pixels:
        featurizers[PIXELS] = lambda batch: batch.pixels
        if prep.partial:
            featurizers |= {GRIDS: _grids, KEPT: _kept}
    if thumbnails:
        featurizers[THUMBNAILS] = thumbnail_features
    return featurizers


def _grids(batch: InputBatch) -> Tensor:
    assert batch.grids_B2 is not None
    return batch.grids_B2


def _kept(batch: InputBatch) -> Tensor:
    assert batch.kept_BM is not None
    return batch.kept_BM


def check_token_bytes(encoder: VisionTransformer, clips: int, encoders: int) -> None:
    """Raises a ValueError if the tokens of so many clips would exceed `TOKEN_BYTES`.

    Args:
        encoder: one of the encoders.
        clips: how many, of all sets together.
        encoders: how many encoders' tokens are kept, the raw tubelets not counted.
    """
    pixels = 3 * encoder.tubelet * encoder.patch_size**2
    need = 2 * clips * encoder.num_patches * (encoders * encoder.width + pixels)
    if need > TOKEN_BYTES:
        raise ValueError(
            f"--limit: the attentive probes of {clips:,} clips would keep {need / 2**30:.0f} GiB "
            "of tokens in memory; take fewer clips, or leave them out with --attentive-epochs 0"
        )


def probe_set(
    uri: str,
    featurizers: Mapping[str, Featurizer],
    prep: Preprocessing,
    *,
    batch_size: int,
    sampler: ClipSampler | None = None,
    limit: int | None = None,
    labels: Labels = Labels(),
    advance: Callable[[int], object] = lambda rows: None,
) -> ProbeSet:
    """Computes every featurizer's features of a labelled set in one pass over its samples.

    Raises:
        ValueError: no row that is asked for has a label.
    """
    places: list[np.ndarray] = []
    read: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in labels.numbers}

    def watched() -> Iterator[pa.Table]:
        for table in iter_labelled(uri, limit, wanted=labels.wanted):
            places.append(np.stack([table[name].to_numpy() for name in PLACE], axis=1))
            read.append(labels.read(table))
            ids.append(sample_ids_array(table))
            for name, number in labels.numbers.items():
                numbers[name].append(number(table))
            advance(table.num_rows)
            yield table
        if not sum(map(len, read)):
            raise ValueError(f"{uri}: no sample that is asked for has a label, which probes need")

    batches = decode_batches(watched(), prep, batch_size, sampler)
    means: dict[str, list[np.ndarray]] = {name: [] for name in featurizers}
    halved = {name: _halve_tokens(one, means[name]) for name, one in featurizers.items()}
    found = compute_features(halved, batches)
    kept = {name: found.pop(name) for name in (PIXELS, GRIDS, KEPT) if name in found}
    pixels = InputBatch(*map(torch.from_numpy, kept.values())) if kept else None
    thumbnails_NP = found.pop(THUMBNAILS, None)
    tokens = {name: values for name, values in found.items() if values.ndim == 3}
    features = {
        name: values if values.ndim == 2 else np.concatenate(means[name])
        for name, values in found.items()
        if name != TUBELETS
    }
    if TUBELETS in tokens:
        tokens["raw_pixels"] = tokens.pop(TUBELETS)
    labels_N, places_N3, ids_N16 = map(np.concatenate, (read, places, ids))
    values = {name: np.concatenate(parts) for name, parts in numbers.items()}
    return ProbeSet(
        uri,
        features,
        labels_N,
        places_N3,
        ids_N16,
        tokens,
        pixels,
        values,
        thumbnails_NP=thumbnails_NP,
    )


def number_set(part: ProbeSet, name: str) -> ProbeSet:
    """Returns the samples with a finite value of a number, which takes the place of the labels."""
    labelled = dataclasses.replace(part, labels_N=part.numbers[name], numbers={}, pixels=None)
    return with_finite_labels(labelled)


def with_finite_labels(part: ProbeSet) -> ProbeSet:
    """Returns the samples whose label is a finite number."""
    kept_N = np.isfinite(part.labels_N)
    if kept_N.all():
        return part
    return dataclasses.replace(selected(part, kept_N), left_out=int((~kept_N).sum()))


def without_near_duplicates(part: ProbeSet, train: ProbeSet, threshold: float) -> ProbeSet:
    """Leaves out the samples that nearly equal one of the training set, and reports how many.

    Args:
        part: a test set, with thumbnails.
        train: the training set, with thumbnails.
        threshold: largest difference of near duplicates, in grey levels from 0 to 255.

    Raises:
        ValueError: no sample stays.
    """
    assert part.thumbnails_NP is not None
    assert train.thumbnails_NP is not None
    found = compare_thumbnails(train.thumbnails_NP, part.thumbnails_NP, threshold)
    if not found.kept_N.any():
        raise ValueError(
            f"--near-duplicates {threshold:g}: every sample of {part.uri} nearly equals one of "
            "--data;\ngive fewer levels, or a test set of its own"
        )
    return dataclasses.replace(selected(part, found.kept_N), duplicates=found.report())


def selected(part: ProbeSet, kept_N: np.ndarray) -> ProbeSet:
    """Returns some of the samples."""
    return dataclasses.replace(
        part,
        features={row: values[kept_N] for row, values in part.features.items()},
        labels_N=part.labels_N[kept_N],
        places_N3=part.places_N3[kept_N],
        ids_N16=part.ids_N16[kept_N],
        tokens={row: values[kept_N] for row, values in part.tokens.items()},
        pixels=None if part.pixels is None else part.pixels[torch.from_numpy(kept_N)],
        numbers={name: values[kept_N] for name, values in part.numbers.items()},
        thumbnails_NP=None if part.thumbnails_NP is None else part.thumbnails_NP[kept_N],
    )


def _halve_tokens(featurize: Featurizer, means: list[np.ndarray]) -> Featurizer:
    """Rounds tokens to float16, enough for the output of a LayerNorm; keeps pooled features.

    The means of every sample's tokens, float32 [B, D], are added to `means` before they are
    rounded, because probes of pooled features read what embed writes and the endpoint answers.
    """

    def halved(batch: InputBatch) -> Tensor:
        values = featurize(batch)
        if values.ndim != 3:
            return values
        means.append(values.nanmean(dim=1).cpu().numpy())
        return values.half()

    return halved
