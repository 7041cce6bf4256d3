"""Which samples made the weights of a run: read from its sample log, counted by id.

A step that was repeated after a loss has lines of several attempts; those of the largest attempt
made the final weights (docs/checkpoints.md).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def chain(lines: Iterable[Mapping[str, Any]], last_step: int) -> dict[int, list[str]]:
    """Returns the sample ids of every step that made the weights of `last_step`."""
    by_step: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["step"] <= last_step:
            by_step[line["step"]][line["attempt"]] += line["ids"]
    return {step: attempts[max(attempts)] for step, attempts in by_step.items()}


def repeated(lines: Iterable[Mapping[str, Any]]) -> int:
    """Returns how many steps more than one attempt took."""
    attempts = defaultdict(set)
    for line in lines:
        attempts[line["step"]].add(line["attempt"])
    return sum(len(of_step) > 1 for of_step in attempts.values())


def faults_of_chain(
    steps: Mapping[int, list[str]], last_step: int, samples: int, batch: int
) -> list[str]:
    """Says what is wrong with a chain: every sample must be in every whole epoch exactly once.

    Args:
        steps: Sample ids by step.
        last_step: The step whose weights are asked about.
        samples: How many samples the data set has, a multiple of `batch`.
        batch: How many a step takes.
    """
    assert samples % batch == 0
    faults = []
    per_epoch = samples // batch
    known: set[str] | None = None
    for first in range(1, last_step + 1, per_epoch):
        epoch = range(first, min(first + per_epoch, last_step + 1))
        where = f"steps {epoch[0]} to {epoch[-1]}"
        if absent := [step for step in epoch if step not in steps]:
            faults.append(f"{where}: no samples are logged for {absent}")
            continue
        counts = Counter(one for step in epoch for one in steps[step])
        if doubled := [one for one, count in counts.items() if count > 1]:
            faults.append(f"{where}: {len(doubled)} samples doubled, {doubled[0]} first")
        if len(epoch) == per_epoch and len(counts) != samples:
            faults.append(f"{where}: {samples - len(counts)} samples lost")
        if known is not None and not counts.keys() <= known:
            faults.append(f"{where}: samples that no other epoch has")
        known = known or (set(counts) if len(counts) == samples else None)
    return faults
