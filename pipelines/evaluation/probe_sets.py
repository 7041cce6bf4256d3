"""A set as what the probes read: every featurizer's features, in one pass over the samples.

Shape suffixes: N rows, B of one batch, C channels, F frames of a clip, H and W pixels, T tokens, D
feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
from torch import Tensor

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
    tubelet_features,
)
from pipelines.loading.clips import ClipSampler

SETS = ("data", "test", "shift_test")
"""The sets of an evaluation, by the flags that name them."""
TOKEN_BYTES = 8 * 2**30
"""Most memory for the frozen tokens that attentive probes read."""
TUBELETS = "raw_tubelets"  # raw pixels as tokens, by which an attentive probe reads them
PIXELS = "pixels"  # as they are, for the supervised baseline


@dataclasses.dataclass(frozen=True)
class ProbeSet:
    """One labelled set as features, by row of the table, and where its images are.

    N rows.
    """

    uri: str
    features: dict[str, np.ndarray]
    labels_N: np.ndarray
    places_N3: np.ndarray
    ids_N16: np.ndarray
    tokens: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What attentive probes read, float16 [N, T, D] by row of the table; empty for images."""
    pixels: np.ndarray | None = None
    """uint8 [N, C, H, W] or [N, C, F, H, W], where the supervised baseline is asked for."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which rows are used, and what is read of them as their labels."""

    wanted: Wanted = LABELLED
    read: Callable[[pa.Table], np.ndarray] = table_labels


def probe_featurizers(
    encoder: VisionTransformer,
    baseline: VisionTransformer,
    prep: Preprocessing,
    *,
    clips: bool,
    attentive: bool,
    pixels: bool,
) -> dict[str, Featurizer]:
    """By row of the table; for attentive probes of all tokens, which are averaged later."""
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
        featurizers[PIXELS] = lambda values: values
    return featurizers


def check_token_bytes(encoder: VisionTransformer, clips: int) -> None:
    """Refuses with a ValueError to keep more tokens in memory than `TOKEN_BYTES`."""
    pixels = 3 * encoder.tubelet * encoder.patch_size**2
    need = 2 * clips * encoder.num_patches * (3 * encoder.width + pixels)
    if need > TOKEN_BYTES:
        raise ValueError(
            f"--limit: the attentive probes of {clips:,} clips would keep {need / 2**30:.0f} GiB of "
            "tokens in memory; take fewer clips, or leave them out with --attentive-epochs 0"
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
        ValueError: no row has a label.
    """
    places: list[np.ndarray] = []
    read: list[np.ndarray] = []
    ids: list[np.ndarray] = []

    def watched() -> Iterator[pa.Table]:
        for table in iter_labelled(uri, limit, wanted=labels.wanted):
            places.append(np.stack([table[name].to_numpy() for name in PLACE], axis=1))
            read.append(labels.read(table))
            ids.append(sample_ids_array(table))
            advance(table.num_rows)
            yield table
        if not sum(map(len, read)):
            raise ValueError(f"{uri}: no sample that is asked for has a label, which probes need")

    batches = decode_batches(watched(), prep, batch_size, sampler)
    halved = {name: _halve_tokens(featurize) for name, featurize in featurizers.items()}
    found = compute_features(halved, batches)
    pixels = found.pop(PIXELS, None)
    tokens = {name: values for name, values in found.items() if values.ndim == 3}
    features = {
        name: values if values.ndim == 2 else values.mean(axis=1, dtype=np.float32)
        for name, values in found.items()
        if name != TUBELETS
    }
    if TUBELETS in tokens:
        tokens["raw_pixels"] = tokens.pop(TUBELETS)
    labels_N, places_N3 = np.concatenate(read), np.concatenate(places)
    return ProbeSet(uri, features, labels_N, places_N3, np.concatenate(ids), tokens, pixels)


def _halve_tokens(featurize: Featurizer) -> Featurizer:
    """Tokens in float16, which is plenty for what a LayerNorm gives; pooled features as they are."""

    def halved(pixels: Tensor) -> Tensor:
        values = featurize(pixels)
        return values.half() if values.ndim == 3 else values

    return halved
