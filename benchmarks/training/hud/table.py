"""The tables, as Markdown and as a page with frames, made of whatever results there are."""

from __future__ import annotations

import base64
import html
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .data import FRAMES, clips
from .rows import Row, result_path, rows
from .settings import KINDS, NEW, OLD, SHOWN, TASKS, Settings

NOT_RUN = "not run"
VARIANTS = (OLD, *NEW)
Cells = list[str]


class Results:
    """Scores by row, labels a class, and seed, of all results in a work folder."""

    def __init__(self, cfg: Settings, seeds: Sequence[int]) -> None:
        self.cfg, self.rows = cfg, rows(cfg)
        self._found: dict[str, dict[int, Any]] = {row.name: {} for row in self.rows}
        for row in self.rows:
            for seed in seeds:
                if (path := result_path(cfg, row, seed)).exists():
                    self._found[row.name][seed] = json.loads(path.read_text())

    def of(
        self, row: str, count: int, variant: str, tasks: Iterable[str], key: str = "score"
    ) -> dict[int, float]:
        """Returns the mean over tasks of each seed that has them all."""
        values = {}
        for seed, result in self._found[row].items():
            by_task = result["scores"].get(str(count), {}).get(variant, {})
            numbers = [by_task.get(task, {}).get(key) for task in tasks]
            if numbers and None not in numbers:
                values[seed] = statistics.fmean(numbers)
        return values

    def recovered(
        self, row: str, count: int, variant: str, tasks: Iterable[str]
    ) -> dict[int, float]:
        """Returns, by seed, the share of what the frozen encoder loses that a row does not lose.

        It is (row - frozen) / (frozen on A - frozen), all but the last on the new variant.
        """
        tasks = list(tasks)
        new, base, old = (
            self.of(name, count, where, tasks)
            for name, where in ((row, variant), ("frozen", variant), ("frozen", OLD))
        )
        return {
            seed: 100 * (new[seed] - base[seed]) / (old[seed] - base[seed])
            for seed in new
            if seed in base and old[seed] > base[seed]
        }

    def facts(self) -> list[dict[str, Any]]:
        """Returns date, length, load and commit of every result."""
        return [r["facts"] for by_seed in self._found.values() for r in by_seed.values()]


def kind_tasks(kind: str) -> list[str]:
    """Names of the tasks of a kind; of all for "mean"."""
    return [task.name for task in TASKS if kind in (task.kind, "mean")]


def cell(values: dict[int, float]) -> str:
    """Writes the mean over seeds, with its standard error from two seeds on."""
    if not values:
        return NOT_RUN
    mean, count = statistics.fmean(values.values()), len(values)
    if count == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(values.values()) / count**0.5:.1f}"


def count_of(row: Row, cfg: Settings) -> int:
    """Labels a class of a row: in its name, or all."""
    last = row.name.rpartition("-")[2]
    return int(last) if last.isdecimal() else cfg.labels[-1]


def main_table(results: Results) -> tuple[Cells, list[Cells]]:
    """Heading and rows: the score of every kind and variant."""
    kinds = (*KINDS, "mean")
    heading = ["row", *(f"{kind} {SHOWN[v]}" for kind in kinds for v in VARIANTS)]
    body = []
    for row in results.rows:
        count = count_of(row, results.cfg)
        cells = [
            cell(results.of(row.name, count, variant, kind_tasks(kind)))
            for kind in kinds
            for variant in VARIANTS
        ]
        body.append([row.title, *cells])
    return heading, body


def recovered_table(results: Results) -> tuple[Cells, list[Cells]]:
    """Heading and rows: what is recovered of the loss on each new HUD, in %, and what A costs."""
    heading = ["row", *(f"recovered on {SHOWN[v]}" for v in NEW), "change on A, points"]
    body, tasks = [], kind_tasks("mean")
    count = results.cfg.labels[-1]
    base = results.of("frozen", count, OLD, tasks)
    for row in results.rows:
        if not (row.label_free or row.title.startswith("control")):
            continue
        shares = [cell(results.recovered(row.name, count, v, tasks)) for v in NEW]
        own = results.of(row.name, count, OLD, tasks)
        change = {seed: own[seed] - base[seed] for seed in own if seed in base}
        body.append([row.title, *shares, cell(change)])
    return heading, body


def few_labels_table(results: Results) -> tuple[Cells, list[Cells]]:
    """Heading and rows: means over all tasks by number of labels, on A and over the new HUDs."""
    counts = results.cfg.labels
    heading = ["row", *(f"{n} labels, {where}" for n in counts for where in ("A", "new"))]
    body, tasks = [], kind_tasks("mean")
    for row in results.rows:
        first, _, last = row.name.rpartition("-")
        if last.isdecimal() and int(last) != counts[0]:
            continue
        cells = []
        for n in counts:
            name = f"{first}-{n}" if last.isdecimal() else row.name
            cells.append(cell(results.of(name, n, OLD, tasks)))
            by_variant = [results.of(name, n, variant, tasks) for variant in NEW]
            seeds = set.intersection(*map(set, by_variant))
            cells.append(cell({s: statistics.fmean(v[s] for v in by_variant) for s in seeds}))
        title = row.title.removesuffix(f", {counts[0]} labels a class")
        body.append([title, *cells])
    return heading, body


def r2_table(results: Results) -> tuple[Cells, list[Cells]]:
    """Heading and rows: R2 of counts and distances, which sees a wrong offset."""
    kinds = ("counts", "distances")
    heading = ["row", *(f"{kind} {SHOWN[v]}" for kind in kinds for v in VARIANTS)]
    body = []
    for row in results.rows:
        count = count_of(row, results.cfg)
        found = [
            results.of(row.name, count, variant, kind_tasks(kind), "r2")
            for kind in kinds
            for variant in VARIANTS
        ]
        body.append([row.title, *map(_r2, found)])
    return heading, body


def _r2(values: dict[int, float]) -> str:
    return f"{statistics.fmean(values.values()):.2f}" if values else NOT_RUN


def markdown(table: tuple[Cells, list[Cells]]) -> str:
    """Writes a table in Markdown, and below it which rows were not run."""
    heading, body = table
    run = [line for line in body if set(line[1:]) != {NOT_RUN}]
    lines = [heading, ["---"] * len(heading), *run]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    missing = [line[0] for line in body if line not in run]
    return f"{text}\n\nNot run: {'; '.join(missing)}." if missing else text


TABLES = {
    "Scores: accuracy of states, rank correlation of counts and distances, in %": main_table,
    "Recovered share of the loss, in %": recovered_table,
    "Few labels: means over all tasks": few_labels_table,
    "R2 of counts and distances": r2_table,
}


def page(results: Results, plot: bytes | None) -> str:
    """Returns a page of its own: frames of every HUD, all tables, and the plot."""
    parts = [f"<h2>The footage</h2>{_frames(results.cfg)}"]
    for title, make in TABLES.items():
        heading, body = make(results)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in heading)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in body
        )
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{lines}</table>")
    if plot:
        parts.append(f'<h2>Means</h2><img src="{_uri(plot)}" alt="bars of the means">')
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:2px 8px;text-align:right}"
    style += "td:first-child,th:first-child{text-align:left}img{image-rendering:pixelated}"
    return f"<!doctype html><meta charset=utf-8><title>HUDs</title><style>{style}</style>" + (
        "<h1>What a new HUD costs</h1>" + "".join(parts)
    )


def _frames(cfg: Settings) -> str:
    """A line of pictures for each variant: one middle frame of every Doom game.

    Atari's pictures are left out, because they may not be passed on.
    """
    games = sorted({task.game for task in TASKS} - {"pong", "ms_pacman"})
    lines = []
    for variant in VARIANTS:
        part = clips(cfg, f"test/{variant}")
        shown = []
        for game in games:
            rows_N = np.flatnonzero(part.games_N == game)
            picture = Image.fromarray(part.pixels_NFHWC[rows_N[len(rows_N) // 3], FRAMES // 2])
            out = io.BytesIO()
            picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(
                out, "PNG"
            )
            shown.append(f'<img src="{_uri(out.getvalue())}" alt="{game}">')
        lines.append(f"<p>{SHOWN[variant]}<br>{' '.join(shown)}</p>")
    return "".join(lines)


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
