"""Draws the rows of objectives.py on one data set: accuracies over CPU minutes.

    python benchmarks/training/objectives_plot.py --rows benchmarks/training/objectives.jsonl \
        --out benchmarks/training/objectives.png

Two panels, kNN and linear probe; a dot a run, a line through the means of a recipe's budgets, and
random weights as a dashed line.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tyro

NAMES = {
    "cifar10_demo": "I-JEPA",
    "lejepa_cifar10_demo": "LeJEPA",
    "vicreg_cifar10_demo": "VICReg",
    "mae_cifar10_demo": "MAE",
    "dmjd_cifar10_demo": "DMJD",
}
PROBES = {"knn": "kNN", "linear": "linear probe"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to draw."""

    rows: Path = Path("benchmarks/training/objectives.jsonl")
    """Of objectives.py."""
    data: str = "data/cifar10"
    """The `--data` of the runs to draw."""
    out: Path = Path("benchmarks/training/objectives.png")
    """PNG to write."""


def read_runs(args: Args) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    runs = [row for row in rows if row["data"] == args.data and not row.get("control")]
    if not runs:
        raise SystemExit(f"--rows {args.rows} has no run with --data {args.data}")
    return runs


def draw_probe(axis: Any, runs: list[dict[str, Any]], field: str) -> None:
    by_recipe: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in runs:
        by_recipe[row["name"]][row["budget"] / 60].append(row[field])
    for recipe, by_minutes in by_recipe.items():
        minutes = sorted(by_minutes)
        means = [statistics.fmean(by_minutes[m]) for m in minutes]
        (line,) = axis.plot(minutes, means, lw=1.5, label=NAMES[recipe])
        dots = [(m, value) for m in minutes for value in by_minutes[m]]
        axis.scatter(*zip(*dots, strict=True), s=18, color=line.get_color())
    random = statistics.fmean(row["random_init"][field] for row in runs)
    axis.axhline(random, ls="--", color="grey", label="random init")
    ticks = sorted({row["budget"] / 60 for row in runs})
    axis.set(xscale="log", xlabel="CPU minutes of one core", ylabel=f"{PROBES[field]}, %")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = read_runs(args)
    figure, axes = plt.subplots(1, len(PROBES), figsize=(10, 4.2))
    for axis, field in zip(axes, PROBES, strict=True):
        draw_probe(axis, runs, field)
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
