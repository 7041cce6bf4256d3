"""Batches over several data sets, with a fixed number of rows of each in every batch.

Each set has a plan of its own (plan.py) over the run's lanes, whose batch is the set's share of the
run's batch. Batch g of the run is batch g of every set, and within a lane the rows of the sets
stand one after the other, in the order of the flags. So what holds for one set holds for a mix: the
order does not depend on the number of workers, the position is the step, and each set goes through
its own epochs at its own pace. A run on a single set has the batches it has without this module.

Shape suffixes: B rows of this rank, L its lanes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipelines.config.data import DataConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import Manifest, hash_bytes, read_manifest
from pipelines.loading.actions import check_actions


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """One of the sets that a run trains on."""

    flag: str
    """The flag that names it."""
    data: DataConfig
    """The run's settings with only this set in `train`, and its rows of a batch in
    `batch_size`."""
    manifest: Manifest


def training_sets(cfg: PretrainConfig) -> list[TrainingSet]:
    """Reads the manifests of the sets that a run trains on, --data.train first.

    Raises:
        ValueError: a set is not ingested, or holds what the objective does not learn from.
    """
    data = cfg.data
    uris = (data.train, *data.mix)
    counts = data.published or (0,) * len(uris)
    found: list[TrainingSet] = []
    for uri, shards, rows in zip(uris, counts, data.rows_by_set, strict=True):
        flag = "--data.mix" if found else "--data.train"
        manifest = read_manifest(uri)
        check_modality(cfg, manifest, flag)
        own = dataclasses.replace(
            data, train=uri, mix=(), mix_shares=(), published=(), batch_size=rows
        )
        manifest = manifest.up_to(shards) if shards else manifest
        check_actions(cfg, uri, manifest, flag)
        found.append(TrainingSet(flag=flag, data=own, manifest=manifest))
    return found


def with_published(cfg: PretrainConfig) -> PretrainConfig:
    """Fixes how many shards are read of sets that may grow: those that they have now."""
    uris = (cfg.data.train, *cfg.data.mix)
    counts = cfg.data.published or (0,) * len(uris)
    manifests = [read_manifest(uri) for uri in uris]
    if all(manifest.live is None for manifest in manifests):
        return cfg
    published = tuple(
        count or (0 if manifest.live is None else len(manifest.shards))
        for count, manifest in zip(counts, manifests, strict=True)
    )
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, published=published))


def check_modality(cfg: PretrainConfig, manifest: Manifest, flag: str = "--data.train") -> None:
    """Checks that the shards hold what the objective learns from.

    Raises:
        ValueError: they hold images where the objective needs video, or the reverse.
    """
    if manifest.modality != cfg.modality:
        raise ValueError(
            f"{flag}: shards of modality {manifest.modality!r}, but --objective.name "
            f"{cfg.objective.name} learns from {cfg.modality!r}"
        )


def identity_of(manifests: Sequence[Manifest]) -> str:
    """Returns 32 hex digits that identify the training data: a set's own hash if it is alone."""
    hashes = [manifest.manifest_hash for manifest in manifests]
    return hashes[0] if len(hashes) == 1 else hash_bytes(json.dumps(hashes).encode()).hex()


def merged(parts: Iterable[Sequence[dict[str, Any]]], lanes: int) -> Iterator[dict[str, Any]]:
    """Merges the batches of several sets into those of the run.

    Args:
        parts: for every step, one batch of each set, as `loader.train_batches` describes them.
        lanes: number of this rank's lanes.

    Yields:
        Batches whose rows go by lane, then by set. `epoch` is that of --data.train. `sets`, an
        int64 tensor [B], numbers the set of each row, 0 for --data.train.
    """
    for batches in parts:
        first = batches[0]
        for number, batch in enumerate(batches):
            batch["sets"] = torch.full_like(batch["labels"], number)
        yield {name: _merge([batch[name] for batch in batches], lanes) for name in first}


def _as_long(values: list[Tensor]) -> list[Tensor]:
    """Pads lists of tokens, which every set pads to its own longest, with zeros to the longest."""
    if len({value.shape[1:] for value in values}) == 1:
        return values
    most = max(value.shape[1] for value in values)
    return [functional.pad(value, (0, most - value.shape[1])) for value in values]


def _merge(values: list[Any], lanes: int) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        by_lane = [value.reshape(lanes, -1, *value.shape[1:]) for value in _as_long(values)]
        whole = torch.cat(by_lane, dim=1).flatten(0, 1)
        return whole.pin_memory() if first.is_pinned() else whole
    if isinstance(first, np.ndarray):
        by_lane = [value.reshape(lanes, -1, *value.shape[1:]) for value in values]
        return np.concatenate(by_lane, axis=1).reshape(-1, *first.shape[1:])
    if isinstance(first, list):
        sizes = [len(value) // lanes for value in values]
        return [
            row
            for lane in range(lanes)
            for value, size in zip(values, sizes, strict=True)
            for row in value[lane * size : (lane + 1) * size]
        ]
    return first  # the step, which all parts share, and the epoch
