"""Which samples trained a run's weights, from the logs of its workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def samples(folder: Path) -> list[dict[str, Any]]:
    """Returns all lines of a run's sample logs."""
    return [
        json.loads(line)
        for path in folder.glob("samples-*.jsonl")
        for line in path.read_text().splitlines()
    ]


def samples_so_far(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run that is going on; none while they are being written."""
    try:
        return samples(folder)
    except (OSError, ValueError):
        return []


def chain(rows: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Returns the samples of each step that made the final weights: its last attempt, by rank."""
    last = {row["step"]: 0 for row in rows}
    for row in rows:
        last[row["step"]] = max(last[row["step"]], row["attempt"])
    rows = [row for row in rows if row["attempt"] == last[row["step"]]]
    found: dict[int, list[str]] = {step: [] for step in sorted(last)}
    for row in sorted(rows, key=lambda row: row["rank"]):
        found[row["step"]] += row["ids"]
    return found
