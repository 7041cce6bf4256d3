"""What an encoder knows of game states that the scene shows, and what a HUD that is gone costs it.

    python -m pipelines.fetch gameplay --out DATA/train --minutes 60 --seed 0 --side 64 --games ...
    python -m pipelines.fetch gameplay --out DATA/test --minutes 40 --seed 1000 --side 64 \
        --games ...
    # test/hud, test/nohud
    python -m pipelines.ingest --source DATA/train/hud --out SHARDS/train/hud ...
    python -m pipelines.pretrain levjepa_gameplay --data.train SHARDS/train/hud
    python benchmarks/training/gameplay.py --checkpoint runs/levjepa_gameplay --data DATA \
        --shards SHARDS --out OUT

One `pipelines.evaluate` a task, each game by itself: probes learn from footage with HUD, and are
scored on other episodes with HUD and on the same without. Tasks whose results are in OUT are not
run again. Prints the tables of gameplay.md and writes OUT/hud_shift.png.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import tyro

from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluate import evaluate
from pipelines.evaluation.probes.registry import main_score
from pipelines.evaluation.report.tables import ROW_NAMES

TASKS = {
    ("pong", "ram_51"): "Pong: height of the player's paddle",
    ("ms_pacman", "ram_10"): "Ms. Pac-Man: her column",
    ("my_way_home", "POSITION_X"): "Doom, my way home: place, x",
    ("my_way_home", "ANGLE"): "Doom, my way home: direction of view",
    ("seaquest", "ram_70"): "Seaquest: column of the submarine",
    ("pong", "ram_50"): "Pong: height of the other paddle",
    ("ms_pacman", "ram_16"): "Ms. Pac-Man: her row",
}
"""Game and column of its states, and what that is."""
SHOWN = ("encoder", "random_init", "single_frame", "supervised", "raw_pixels")
Results = dict[tuple[str, str], dict[str, Any]]


def score(results: dict[str, Any], row: str) -> tuple[float, float]:
    """Accuracy in % on footage with HUD and without, of the attentive probe or supervised."""
    if row == "supervised":
        found = results["supervised"]
        return 100 * found["accuracy"], 100 * found["shift_accuracy"]
    with_hud, without = main_score(results["rows"][row])
    return 100 * with_hud, 100 * without


def tables(found: Results) -> str:
    """Attentive probe with HUD and change without, and kNN, by task, as Markdown."""
    names = [ROW_NAMES[row] for row in SHOWN]
    lines = [f"| task | chance | {' | '.join(names)} |", "|---" * (len(SHOWN) + 2) + "|"]
    for task, results in found.items():
        cells = [score(results, row) for row in SHOWN]
        shown = [f"{a:.1f} ({b - a:+.1f})" for a, b in cells]
        chance = 100 * results["task"]["chance"]
        lines.append(f"| {TASKS[task]} | {chance:.1f} | {' | '.join(shown)} |")
    means = []
    for row in SHOWN:
        pairs = [score(results, row) for results in found.values()]
        a, b = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        means.append(f"{a:.1f} ({b - a:+.1f})")
    lines += [f"| mean | | {' | '.join(means)} |", ""]
    probed = [row for row in SHOWN if row != "supervised"]
    lines += [
        f"| kNN | {' | '.join(ROW_NAMES[row] for row in probed)} |",
        "|---" * (len(SHOWN)) + "|",
    ]
    for task, results in found.items():
        pairs = [(results["rows"][row]["knn"], results["rows"][row]["knn_shift"]) for row in probed]
        shown = [f"{100 * a:.1f} ({100 * (b - a):+.1f})" for a, b in pairs]
        lines.append(f"| {TASKS[task]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(found: Results, path: pathlib.Path) -> None:
    """Bars of every task: accuracy with HUD, faint, and without, full."""
    import matplotlib.pyplot as plt

    rows = [row for row in SHOWN if row != "single_frame"]
    figure, axis = plt.subplots(figsize=(11, 4))
    for i, row in enumerate(rows):
        pairs = [score(results, row) for results in found.values()]
        places = [n + 0.2 * (i - 1.5) for n in range(len(pairs))]
        bars = axis.bar(places, [b for _, b in pairs], 0.17, label=ROW_NAMES[row])
        colour = bars.patches[0].get_facecolor()
        axis.bar(places, [a for a, _ in pairs], 0.17, color=colour, alpha=0.3)
    labels = [TASKS[task].replace(": ", ":\n") for task in found]
    axis.set_xticks(range(len(found)), labels, fontsize=6)
    axis.set_ylabel("accuracy in %: with HUD (faint), without (full)", fontsize=7)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    checkpoint: str,
    data: pathlib.Path,
    shards: pathlib.Path,
    out: pathlib.Path,
    supervised_epochs: int = 20,
    attentive_epochs: int = 60,
    tasks: int = len(TASKS),
) -> None:
    """Evaluates an encoder on every task.

    Args:
        checkpoint: what `pipelines.evaluate` takes.
        data: folder with `train/columns.json`.
        shards: folder with the ingested `train/hud`, `test/hud` and `test/nohud`.
        out: folder for the results, one a task.
        supervised_epochs: of the supervised baseline.
        attentive_epochs: of the attentive probe.
        tasks: how many of `TASKS`, in their order.
    """
    found: Results = {}
    for game, state in list(TASKS)[:tasks]:
        folder = out / f"{game}-{state}"
        if not (folder / "report.html").exists():
            cfg = EvaluateConfig(
                checkpoint=checkpoint,
                data=str(shards / "train/hud"),
                test=str(shards / "test/hud"),
                shift_test=str(shards / "test/nohud"),
                columns=str(data / "train/columns.json"),
                state=state,
                only=game,
                attentive_epochs=attentive_epochs,
                attentive_lrs=(3e-3, 1e-3),
                attentive_decays=(0.1,),
                attentive_standardise=True,
                supervised_epochs=supervised_epochs,
                out=str(folder),
            )
            evaluate(cfg)
        found[game, state] = json.loads((folder / "results.json").read_text())
        print(tables(found), flush=True)
    draw(found, out / "hud_shift.png")


if __name__ == "__main__":
    tyro.cli(main)
