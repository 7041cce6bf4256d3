"""Checks what an evaluation's numbers are worth, judged by the sets that they were measured on.

Shape suffixes: N samples of a set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.dataset.shards import Manifest
from pipelines.evaluation.arrays import Array, as_labels
from pipelines.evaluation.probe_sets import SETS, ProbeSet, number_set

SHOWN = 6
"""Most classes that a sentence names."""
MOTION_WITHIN = 0.05
"""A task is one of motion if a single frame scores at most this much above guessing."""


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """Facts about a set whose features were probed.

    Attributes:
        manifest_hash: identifies the set's content.
        labels_N: class index of every sample that was used.
        ids_N16: their sample ids.
        unlabelled: number of samples left out because they have no label.
        left_out: numbers of samples left out because a value is not finite, by the flag and the
            name of the value.
    """

    manifest_hash: str
    labels_N: np.ndarray
    ids_N16: np.ndarray
    unlabelled: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def facts_of(
    manifests: Sequence[Manifest], sets: Sequence[ProbeSet], *, all_rows: bool
) -> dict[str, SetFacts]:
    """Collects the facts of sets, which come in the order of `probe_sets.SETS`, by flag.

    Args:
        all_rows: whether a missing label is the only reason for leaving a sample out, besides a
            near duplicate in the training set.
    """
    return {
        f"--{name.replace('_', '-')}": SetFacts(
            manifest_hash=manifest.manifest_hash,
            labels_N=part.labels_N,
            ids_N16=part.ids_N16,
            unlabelled=manifest.num_samples - _labelled(part) if all_rows else 0,
            left_out=_left_out(part),
        )
        for name, manifest, part in zip(SETS, manifests, sets, strict=False)
    }


def _labelled(part: ProbeSet) -> int:
    """Counts the samples with a label, near duplicates that were left out included."""
    return len(part.labels_N) if part.duplicates is None else int(part.duplicates["test"])


def _left_out(part: ProbeSet) -> dict[str, int]:
    counts = {f"--number {name}": number_set(part, name).left_out for name in part.numbers}
    return {flag: count for flag, count in {"--state": part.left_out, **counts}.items() if count}


def validity_warnings(sets: Mapping[str, SetFacts], classes: Sequence[str] | None) -> list[str]:
    """Lists in whole sentences the reasons why the numbers on these sets may mean nothing.

    Args:
        sets: by the flag that names each; the probes learned from the first one.
        classes: names by label; None if no probe learned classes.

    Returns:
        The warnings; none for sets that are as they should be.
    """
    (data_flag, data), *others = sets.items()
    found = []
    if classes is not None:
        found += [*_one_class(data_flag, data, classes), *_few_labels(data_flag, data, classes)]
    for flag, other in others:
        found += _shared(flag, other, data_flag, data)
        if classes is not None:
            found += _one_class(flag, other, classes)
            found += _not_learned(flag, other, data_flag, data, classes)
    for flag, part in sets.items():
        found += [*_unlabelled(flag, part), *_not_finite(flag, part)]
    return found


def _one_class(flag: str, part: SetFacts, classes: Sequence[str]) -> list[str]:
    labels = np.unique(part.labels_N)
    if len(labels) > 1:
        return []
    name = classes[labels[0]]
    fault = f"{flag}: all {len(part.labels_N):,} samples are of one class, {name!r}"
    why = "In a folder, a file's class is the folder that it lies in."
    return [f"{fault}: accuracies say nothing of the encoder. ({why})"]


def _few_labels(flag: str, part: SetFacts, classes: Sequence[str]) -> list[str]:
    present, count = len(np.unique(part.labels_N)), len(part.labels_N)
    if count < len(classes):
        return [f"{flag}: {count:,} labelled samples for {len(classes):,} classes"]
    absent = [name for label, name in enumerate(classes) if label not in part.labels_N]
    if not absent or present == 1:
        return []
    lost = f"{flag}: {len(absent):,} of {len(classes):,} classes have no sample ({_some(absent)})"
    return [f"{lost}: guessing is right more often than one time in {len(classes):,}"]


def _not_learned(
    flag: str, part: SetFacts, data_flag: str, data: SetFacts, classes: Sequence[str]
) -> list[str]:
    lost_N = ~np.isin(part.labels_N, data.labels_N)
    if not lost_N.any():
        return []
    names = [classes[label] for label in np.unique(part.labels_N[lost_N])]
    share = f"{lost_N.sum():,} of {len(lost_N):,} samples ({100 * lost_N.mean():.1f}%)"
    return [f"{flag}: {share} are of classes without a sample in {data_flag} ({_some(names)})"]


def _shared(flag: str, part: SetFacts, data_flag: str, data: SetFacts) -> list[str]:
    if part.manifest_hash == data.manifest_hash:
        return [
            f"{flag}: the same set as {data_flag}; the probes are scored on what they learned from"
        ]
    ours, theirs = (np.ascontiguousarray(p.ids_N16).view("V16").ravel() for p in (part, data))
    shared_N = np.isin(ours, theirs)
    if not shared_N.any():
        return []
    share = f"{shared_N.sum():,} of {len(shared_N):,} samples ({100 * shared_N.mean():.1f}%)"
    return [f"{flag}: {share} are also in {data_flag}; on these the probes say what they were told"]


def _unlabelled(flag: str, part: SetFacts) -> list[str]:
    if not part.unlabelled:
        return []
    total = part.unlabelled + len(part.labels_N)
    return [f"{flag}: {part.unlabelled:,} of {total:,} samples have no label and are left out"]


def _not_finite(flag: str, part: SetFacts) -> list[str]:
    return [
        f"{flag}: {count:,} samples have no finite value of {value} and are left out"
        for value, count in part.left_out.items()
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def task_of(single_frame: float, test_labels: Array) -> dict[str, str | float]:
    """Decides whether the labels of clips depend on motion or on appearance.

    Args:
        single_frame: best accuracy of the probes that saw a single frame of each clip.
        test_labels: [Q] class indices from 0; guessing scores the share of the commonest class.
    """
    labels_Q = as_labels(test_labels)
    chance = float(labels_Q.bincount().max()) / len(labels_Q)
    kind = "motion" if single_frame <= chance + MOTION_WITHIN else "appearance"
    return {"kind": kind, "chance": chance, "single_frame": single_frame}
