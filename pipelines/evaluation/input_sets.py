"""Reads the sets of an evaluation: checks manifests, computes features, and takes labels from the
shards or from game states."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.progress import Progress

from models.encoders.vit import VisionTransformer
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.rows import Wanted, check_classes
from pipelines.dataset.shards import Manifest, read_manifest
from pipelines.evaluation.features import (
    Featurizer,
    Pooling,
    block_features,
    encoder_features,
)
from pipelines.evaluation.probe_sets import (
    Labels,
    ProbeSet,
    check_token_bytes,
    probe_featurizers,
    probe_set,
    with_finite_labels,
    without_near_duplicates,
)
from pipelines.evaluation.state_labels import Bins, find_column, state_reader
from pipelines.evaluation.subject import Subject


def read_manifests(cfg: EvaluateConfig) -> list[Manifest]:
    """Reads the manifests of --data, --test and, where given, --shift-test.

    Raises:
        ValueError: a set is not ingested, has no labels, or differs from --data in its classes or
            modality; or a flag does not apply to these sets.
    """
    uris = {"--data": cfg.data, "--test": cfg.test, "--shift-test": cfg.shift_test}
    sets = {flag: read_manifest(uri) for flag, uri in uris.items() if uri is not None}
    data = sets["--data"]
    for flag, manifest in sets.items():
        if manifest.modality != data.modality:
            raise ValueError(f"--data holds {data.modality}s, {flag} {manifest.modality}s")
        if flag != "--data" and (_of_shards(cfg) or cfg.only is not None):
            check_classes({"--data": data, flag: manifest})
    if not _of_shards(cfg) and data.modality != "video":
        flag = "--number" if cfg.state is None else "--state"
        raise ValueError(f"{flag}: images have no states; it goes with video")
    if cfg.only is not None and cfg.only not in data.classes:
        raise ValueError(f"--only: no class {cfg.only!r}; there are {', '.join(data.classes)}")
    return list(sets.values())


def read_sets(
    cfg: EvaluateConfig,
    subject: Subject,
    baseline: VisionTransformer,
    manifests: Sequence[Manifest],
    console: Console,
    others: Mapping[str, VisionTransformer] | None = None,
) -> tuple[list[ProbeSet], list[str]]:
    """Computes the features of every set; returns the sets and the names of their classes.

    Args:
        cfg: the job.
        subject: the encoder.
        baseline: an untrained one of its shape.
        manifests: of the sets, in the order of their flags.
        console: where the progress is shown.
        others: further encoders with the subject's transform, by the name of their features.
    """
    prep, attentive = subject.preprocessing, _attentive(cfg, subject)
    featurizers = probe_featurizers(
        *(subject.encoder, baseline, prep),
        clips=subject.sampler is not None,
        attentive=attentive,
        pixels=cfg.supervised_epochs > 0,
        thumbnails=cfg.near_duplicates is not None,
    )
    pooling: Pooling = "patches" if attentive else "mean"
    for name, encoder in (others or {}).items():
        featurizers[name] = encoder_features(encoder, prep, pooling=pooling)
    check_tokens(cfg, subject, manifests, len(others or {}))
    return _read(cfg, subject, featurizers, manifests, console)


def read_blocks(
    cfg: EvaluateConfig,
    subject: Subject,
    encoders: Mapping[str, VisionTransformer],
    manifests: Sequence[Manifest],
    console: Console,
) -> ProbeSet:
    """Computes the features of all blocks of some encoders over the training set, in one pass.

    Args:
        cfg: the job.
        subject: the encoder, whose transform all of them share.
        encoders: L blocks each, by the name of their features.
        manifests: of the sets, in the order of their flags.
        console: where the progress is shown.

    Returns:
        The set with features [N, L * D] by name; see `features.block_features`.
    """
    featurizers = {
        name: block_features(encoder, subject.preprocessing) for name, encoder in encoders.items()
    }
    (train,), _ = _read(cfg, subject, featurizers, manifests[:1], console)
    return train


def check_tokens(
    cfg: EvaluateConfig, subject: Subject, manifests: Sequence[Manifest], others: int
) -> None:
    """Raises a ValueError if attentive probes would keep too many tokens in memory.

    Args:
        cfg: the job.
        subject: the encoder.
        manifests: of the sets.
        others: encoders besides it, its untrained twin and the single frame.
    """
    if _attentive(cfg, subject):
        clips = sum(_totals(cfg, manifests))
        check_token_bytes(subject.encoder, clips, encoders=3 + others)


def _attentive(cfg: EvaluateConfig, subject: Subject) -> bool:
    return subject.sampler is not None and cfg.attentive_epochs > 0


def _totals(cfg: EvaluateConfig, manifests: Sequence[Manifest]) -> list[int]:
    return [min(manifest.num_samples, cfg.limit or sys.maxsize) for manifest in manifests]


def _read(
    cfg: EvaluateConfig,
    subject: Subject,
    featurizers: Mapping[str, Featurizer],
    manifests: Sequence[Manifest],
    console: Console,
) -> tuple[list[ProbeSet], list[str]]:
    """Computes the features of the sets of these manifests; returns them and their classes."""
    labels = _labels(cfg, subject, manifests[0].classes)
    with Progress(console=console, transient=True) as progress:

        def read(uri: str, total: int) -> ProbeSet:
            task = progress.add_task(f"features of {uri}", total=total)
            return probe_set(
                uri,
                featurizers,
                subject.preprocessing,
                batch_size=cfg.batch_size,
                sampler=subject.sampler,
                limit=cfg.limit,
                labels=labels,
                advance=lambda rows: progress.advance(task, rows),
            )

        uris = [uri for uri in (cfg.data, cfg.test, cfg.shift_test) if uri is not None]
        totals = _totals(cfg, manifests)
        sets = [read(uri, total) for uri, total in zip(uris, totals, strict=False)]
    if cfg.near_duplicates is not None:
        train, *tests = sets
        sets = [train, *(without_near_duplicates(t, train, cfg.near_duplicates) for t in tests)]
    _check_numbers(sets)
    if _of_shards(cfg):
        return sets, list(manifests[0].classes)
    if cfg.has_classes:
        sets = [with_finite_labels(part) for part in sets]
        return _binned(sets, Bins.of(sets[0].labels_N, cfg.bins))
    return _binned(sets, Bins.most(sets[0].labels_N, cfg.bins))


def _binned(sets: Sequence[ProbeSet], bins: Bins) -> tuple[list[ProbeSet], list[str]]:
    """Replaces labels that are values by their bins; those not finite get a bin of their own."""
    binned = [dataclasses.replace(p, labels_N=bins.classes(p.labels_N)) for p in sets]
    none = any(len(bins.names) in part.labels_N for part in binned)
    return binned, [*bins.names, *(["no value"] if none else [])]


def _of_shards(cfg: EvaluateConfig) -> bool:
    """Returns whether the classes are those of the shards."""
    return cfg.state is None and not cfg.number


def _labels(cfg: EvaluateConfig, subject: Subject, classes: tuple[str, ...]) -> Labels:
    only = None if cfg.only is None else classes.index(cfg.only)
    if _of_shards(cfg):
        return Labels(Wanted(only=only))
    sampler = subject.sampler
    assert sampler is not None
    numbers = {
        name: state_reader(find_column(cfg, name, "--number"), sampler, "--number")
        for name in cfg.number
    }
    # Without --state nothing learns the bins: the report picks and captions its samples by them.
    first = next(iter(numbers.values())) if cfg.state is None else None
    read = first or state_reader(find_column(cfg, str(cfg.state)), sampler)
    return Labels(Wanted(column="states", only=only), read, numbers)


def _check_numbers(sets: Sequence[ProbeSet]) -> None:
    for flag, part in zip(("--data", "--test", "--shift-test"), sets, strict=False):
        for name, values_N in part.numbers.items():
            if np.isfinite(values_N).sum() < 2:
                raise ValueError(f"--number: {name} has fewer than two finite values in {flag}")
