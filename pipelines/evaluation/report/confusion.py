"""The section of the report that shows which classes are taken for which, and what a shift does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TABLES = {
    "": ("classes", "knn_classes"),
    "the second test set": ("shift_classes", "knn_shift_classes"),
}
"""Where `attentive` (or the row, for kNN) holds the table of each test set."""


def confusions(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the encoder's confusion matrices by its main probe, one for each test set.

    Each row has the true class's name, its accuracy, the change of that against the first test set
    (None in the first), and for every predicted class the count and the share of the row, in %.
    """
    row = results["rows"]["encoder"]
    nested = row.get("attentive", {})
    found: list[dict[str, Any]] = []
    for title, (key, knn_key) in TABLES.items():
        table = nested.get(key) or (None if nested else row.get(knn_key))
        if table and table["confusion"]:
            first = found[0]["accuracy"] if found else None
            found.append(_matrix(title, table, first, results["classes"]))
    return found


def _matrix(
    title: str,
    table: Mapping[str, Any],
    first: Sequence[float | None] | None,
    classes: Sequence[str],
) -> dict[str, Any]:
    rows = []
    for index, counts in enumerate(table["confusion"]):
        total, own = sum(counts) or 1, table["accuracy"][index]
        before = None if first is None else first[index]
        rows.append(
            {
                "name": classes[index],
                "accuracy": None if own is None else 100 * own,
                "change": None if own is None or before is None else 100 * (own - before),
                "cells": [(count, round(100 * count / total)) for count in counts],
            }
        )
    return {"title": title, "accuracy": table["accuracy"], "rows": rows}
