"""Probes of one encoder read on another one's features: can a served encoder be replaced?

A probe that stands behind an endpoint is fitted once. When the encoder is replaced, the probe reads
features that it has never seen. Each row here names whose features a probe is fitted on, and whose
it is then read on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.artifacts.alignment import Alignment
from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.probe import ProbeTask
from pipelines.evaluation.probes.registry import accuracies, scored_probes

OLD, ADAPTED, ALIGNED, RANDOM = "encoder", "adapted", "aligned", "random_init"
"""Whose features, by their name in `ProbeSet.features`."""
SHIFT_ALIGNED = "encoder_aligned"
"""Row of results.json: the encoder's features, those of the shift set aligned."""
ROWS = {
    "old": (OLD, OLD),
    "adapted": (OLD, ADAPTED),
    "aligned": (OLD, ALIGNED),
    "refitted": (ADAPTED, ADAPTED),
    "random": (RANDOM, RANDOM),
}
"""Whose features the probes are fitted on, and whose they are read on, by row."""

Map = Callable[[np.ndarray], np.ndarray]
Accuracies = dict[str, dict[str, float]]
"""Accuracy by row of `ROWS`, then by the probe's key in a row of results.json."""


def read_replaced(
    sets: Sequence[ProbeSet], cfg: EvaluateConfig, heads: int
) -> dict[str, Accuracies]:
    """Fits and reads the probes of every row.

    Args:
        sets: labelled old footage to fit on, labelled old footage to read on, and labelled new
            footage to read on where there is any; with the features of the encoders in `ROWS`, of
            which the aligned ones may be absent.
        cfg: settings of the probes.
        heads: attention heads of the encoders.

    Returns:
        The accuracies on `old_footage`, and on `new_footage` where there is any.
    """
    train, test, *new = sets
    found: dict[str, Accuracies] = {"old_footage": {}}
    for row, (fitted, read) in ROWS.items():
        if read not in train.features:
            continue
        task = ProbeTask(
            row=OLD,
            train=_features_of(train, fitted),
            test=_features_of(test, read),
            shifted=_features_of(new[0], read) if new else None,
            cfg=cfg,
            heads=heads,
        )
        result: dict[str, Any] = {}
        for probe in scored_probes().values():
            result |= probe.run(task)
        found["old_footage"][row] = accuracies(result)
        if new:
            found.setdefault("new_footage", {})[row] = accuracies(result, shifted=True)
    return found


def with_aligned(part: ProbeSet, alignment: Alignment) -> ProbeSet:
    """Adds the adapted encoder's features, brought back to the old ones by an alignment."""
    return _with_mapped(part, ADAPTED, ALIGNED, alignment)


def with_aligned_shift(sets: Sequence[ProbeSet], alignment: Alignment) -> list[ProbeSet]:
    """Adds features to fit probes on as they are, and to read them on aligned, as a row.

    Args:
        sets: to fit on, to read on, and the footage that an alignment is for.
        alignment: of the last set's features and tokens.
    """
    *before, shifted = sets
    kept = [_with_mapped(part, OLD, SHIFT_ALIGNED, lambda features: features) for part in before]
    return [*kept, _with_mapped(shifted, OLD, SHIFT_ALIGNED, alignment)]


def _with_mapped(part: ProbeSet, row: str, mapped: str, function: Map) -> ProbeSet:
    """Adds a function of a row's features and tokens as another row, right after it."""
    return dataclasses.replace(
        part,
        features=_inserted(part.features, row, mapped, function),
        tokens=_inserted(part.tokens, row, mapped, function),
    )


def _inserted(
    values: dict[str, np.ndarray], row: str, mapped: str, function: Map
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, one in values.items():
        found[name] = one
        if name == row:
            found[mapped] = function(one)
    return found


def _features_of(part: ProbeSet, encoder: str) -> ProbeSet:
    """The set with one encoder's features, under the name that `ProbeTask.row` asks for."""
    tokens = {OLD: part.tokens[encoder]} if encoder in part.tokens else {}
    return dataclasses.replace(part, features={OLD: part.features[encoder]}, tokens=tokens)
