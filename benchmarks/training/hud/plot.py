"""Bars of every row's mean over tasks on each HUD, with the standard error over seeds."""

from __future__ import annotations

import io
import statistics

from .settings import NEW, OLD, SHOWN
from .table import Results, count_of, kind_tasks


def draw(results: Results) -> bytes | None:
    """Returns a PNG, or None if nothing was run."""
    import matplotlib.pyplot as plt

    tasks = kind_tasks("mean")
    drawn = [
        row for row in results.rows if results.of(row.name, count_of(row, results.cfg), OLD, tasks)
    ]
    if not drawn:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.45 * len(drawn)))
    variants = (OLD, *NEW)
    for i, variant in enumerate(variants):
        means, errors, places = [], [], []
        for n, row in enumerate(drawn):
            values = results.of(row.name, count_of(row, results.cfg), variant, tasks).values()
            if values:
                means.append(statistics.fmean(values))
                spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                errors.append(spread)
                places.append(n + 0.2 * (i - 1.5))
        axis.barh(places, means, 0.18, xerr=errors, label=SHOWN[variant])
    axis.set_yticks(range(len(drawn)), [row.title for row in drawn], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("mean over tasks, %: accuracy of states, rank correlation of numbers")
    axis.legend(fontsize=7)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()
