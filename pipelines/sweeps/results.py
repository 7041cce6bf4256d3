"""Results of a sweep: table, plot, and how well RankMe and LiDAR agree with labelled probes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from scipy.stats import kendalltau, spearmanr

RANKS = {"rankme": "RankMe", "lidar": "LiDAR"}
PROBES = {"knn": "kNN", "linear": "linear probe"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a sweep, with the metrics of its newest checkpoint (None if it has none)."""

    trial: int
    settings: dict[str, Any]
    outcome: str
    """`finished`, `stopped` (early), `collapsed` or `failed`."""
    reason: str | None = None
    step: int = 0
    seconds: float = 0.0
    run: str = ""
    """URI of the run's folder."""
    rankme: float | None = None
    lidar: float | None = None
    knn: float | None = None
    """Accuracy on the test set, a fraction."""
    linear: float | None = None
    """Accuracy on the test set, a fraction."""
    scored: bool = field(default=False)
    """Whether the newest checkpoint has been scored; also true if there is none to score."""


def _both(rows: Sequence[Row], *names: str) -> list[Row]:
    return [row for row in rows if all(getattr(row, name) is not None for name in names)]


def best(rows: Sequence[Row], by: str) -> Row | None:
    """The run with the largest `rankme`, `lidar`, `knn` or `linear`; None if no run has a value."""
    found = _both(rows, by)
    return max(found, key=lambda row: getattr(row, by)) if found else None


def verdict(rows: Sequence[Row]) -> list[str]:
    """Says which run is chosen without labels and how much accuracy this choice costs.

    Runs that collapsed or failed are left out, whatever the metrics of their last checkpoint.
    """
    rows, lines = [row for row in rows if row.outcome in ("finished", "stopped")], []
    for by, name in RANKS.items():
        chosen = best(rows, by)
        if chosen is None:
            return ["no run came to a checkpoint: nothing to choose from"]
        value = getattr(chosen, by)
        lines.append(f"{name} chooses trial {chosen.trial} ({name} {value:.1f}): {_named(chosen)}")
    probed = [probe for probe in PROBES if _both(rows, probe)]
    if not probed:
        return [
            *lines,
            "without labelled test shards (--data.test) it cannot be said how good this choice is",
        ]
    for probe in probed:
        lines += [_cost(rows, by, probe) for by in RANKS]
    steps = {row.step for row in _both(rows, "rankme")}
    if len(steps) > 1:
        lines.append(
            f"note that runs ended between steps {min(steps)} and {max(steps)}: both metrics of a "
            "run that was stopped early come from fewer steps"
        )
    return lines


def _named(row: Row) -> str:
    return " ".join(f"{key}={_text(value)}" for key, value in row.settings.items())


def _cost(rows: Sequence[Row], by: str, probe: str) -> str:
    rows = _both(rows, by, probe)
    chosen, ideal = best(rows, by), best(rows, probe)
    assert chosen is not None
    assert ideal is not None
    scores = [100 * getattr(row, probe) for row in rows]
    cost = 100 * (getattr(ideal, probe) - getattr(chosen, probe))
    at_random = max(scores) - sum(scores) / len(scores)
    return (
        f"{RANKS[by]} against {PROBES[probe]} over {len(rows)} runs: "
        f"{_agreement(rows, by, probe)}; "
        f"its choice, trial {chosen.trial}, has {100 * getattr(chosen, probe):.1f}, the best, "
        f"trial {ideal.trial}, {max(scores):.1f}: it costs {cost:.1f} points, a run picked at "
        f"random {at_random:.1f} on average"
    )


def _agreement(rows: Sequence[Row], by: str, probe: str) -> str:
    if len(rows) < 3:
        return "too few to correlate"
    pair = [[getattr(row, name) for row in rows] for name in (by, probe)]
    rho, tau = spearmanr(*pair), kendalltau(*pair)
    if math.isnan(rho.statistic):
        return "one of both never varies"
    return (
        f"Spearman {rho.statistic:+.2f} (p {rho.pvalue:.2g}), "
        f"Kendall {tau.statistic:+.2f} (p {tau.pvalue:.2g})"
    )


def table(rows: Sequence[Row]) -> Table:
    """Builds the table for a terminal, best RankMe first."""
    keys = list(rows[0].settings) if rows else []
    shown = Table(
        title="runs, best RankMe first; accuracies in % of the test set", show_lines=False
    )
    for name in ("trial", *keys, "outcome", "step", *RANKS.values(), *PROBES.values(), "s"):
        shown.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: -(row.rankme or -1.0)):
        shown.add_row(
            str(row.trial),
            *(_text(row.settings[key]) for key in keys),
            row.outcome,
            str(row.step),
            *("-" if v is None else f"{v:.1f}" for v in (row.rankme, row.lidar)),
            *("-" if v is None else f"{100 * v:.1f}" for v in (row.knn, row.linear)),
            f"{row.seconds:.0f}",
        )
    return shown


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(rows: Sequence[Row]) -> bytes:
    """Draws a PNG: probes against RankMe and LiDAR, and these against every hyperparameter."""
    # A Figure instead of pyplot, which has global state and may open a window.
    from matplotlib.figure import Figure

    rows = _both(rows, *RANKS)
    keys = list(rows[0].settings) if rows else []
    probes = [probe for probe in PROBES if _both(rows, probe)]
    panels = [(probe, "probe") for probe in probes] + [(key, "setting") for key in keys]
    if not panels:
        return _png(Figure(figsize=(4, 3)))
    figure = Figure(figsize=(3.4 * len(panels), 6), layout="constrained")
    for line, by in enumerate(RANKS):
        for column, (name, kind) in enumerate(panels):
            axes = figure.add_subplot(2, len(panels), line * len(panels) + column + 1)
            if kind == "probe":
                _scatter_probe(axes, rows, by, name)
            else:
                _scatter_setting(axes, rows, by, name, probes)
    return _png(figure)


def _scatter_probe(axes: Any, rows: Sequence[Row], by: str, probe: str) -> None:
    rows = _both(rows, by, probe)
    for ended, marker in ((True, "o"), (False, "x")):
        part = [row for row in rows if (row.outcome == "finished") is ended]
        x, y = ([getattr(row, n) for row in part] for n in (by, probe))
        axes.scatter(x, [100 * v for v in y], marker=marker, color="#2563eb")
    for row in rows:
        axes.annotate(
            str(row.trial),
            (getattr(row, by), 100 * getattr(row, probe)),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=7,
        )
    axes.margins(0.12)
    axes.set(xlabel=f"{RANKS[by]} (x: not finished)", ylabel=f"{PROBES[probe]}, %")


def _scatter_setting(
    axes: Any, rows: Sequence[Row], by: str, key: str, probes: Sequence[str]
) -> None:
    values = [row.settings[key] for row in rows]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    x = values if numbers else [_text(v) for v in values]
    colour = [100 * (getattr(row, probes[0]) or math.nan) for row in rows] if probes else "#2563eb"
    dots = axes.scatter(x, [getattr(row, by) for row in rows], c=colour)
    if numbers and min(values) > 0 and max(values) / min(values) >= 10:
        axes.set_xscale("log")
    if numbers and len(set(values)) <= 6:
        axes.set_xticks(sorted(set(values)), [_text(v) for v in sorted(set(values))])
        axes.minorticks_off()
    axes.set(xlabel=key, ylabel=RANKS[by])
    if probes:
        axes.figure.colorbar(dots, ax=axes, label=f"{PROBES[probes[0]]}, %")


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
