"""What a new HUD costs, and which way of training without its labels recovers it.

    python benchmarks/training/hud.py --footage FOOTAGE --work WORK --seeds 0 1 2
    python benchmarks/training/hud.py --footage FOOTAGE --work WORK --quick
    python benchmarks/training/hud.py --footage FOOTAGE --work WORK --only        # tables only

Labels exist for the old HUD alone. Probes learn from them and are read on other episodes with the
old HUD and with each new one; test frames that nearly equal a training frame are left out. FOOTAGE
is recorded by `pipelines.fetch gameplay`, see hud.md. Every step is a job whose result is stored in
WORK: after a kill the same command goes on, and rows or seeds may be added later. Prints the tables
of hud.md and writes WORK/hud.md, hud.html and hud.png.
"""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from pathlib import Path

import torch
import tyro
from hud.data import kept_keys
from hud.jobs import once
from hud.plot import draw
from hud.rows import rows, run_row
from hud.settings import Settings
from hud.table import TABLES, Results, markdown, page


def write_tables(cfg: Settings, seeds: tuple[int, ...]) -> str:
    """Writes the tables and the plot of what has been run; returns the tables."""
    results = Results(cfg, seeds)
    text = "\n\n".join(
        f"**{title}**\n\n{markdown(make(results))}" for title, make in TABLES.items()
    )
    plot = draw(results)
    (cfg.work / "hud.md").write_text(text + "\n")
    (cfg.work / "hud.html").write_text(page(results, plot))
    if plot:
        (cfg.work / "hud.png").write_bytes(plot)
    return text


def main(
    footage: Path,
    work: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    only: tuple[str, ...] | None = None,
    quick: bool = False,
    prefix: str = "nice -n 10",
) -> None:
    """Runs the rows that have no result yet, seed by seed, and makes the tables.

    Args:
        footage: folder with `train`, `test`, `new` and `other`.
        work: folder of shards, runs and results.
        seeds: of networks and draws of labels.
        only: names of rows to run, in this order; none for the tables alone. Default: all.
        prefix: what the commands that ingest and train are started with.
        quick: a few steps of everything, to see that it runs; give it a work folder of its own.
    """
    torch.set_num_threads(1)
    cfg = (Settings.quick if quick else Settings)(
        work=work, footage=footage, prefix=tuple(shlex.split(prefix))
    )
    known = {row.name: row for row in rows(cfg)}
    if unknown := set(only or ()) - set(known):
        sys.exit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    once(work / "jobs" / "near_duplicates.json", lambda: {"games": kept_keys(cfg)[1]})
    failed = False
    for seed in seeds:
        for name in known if only is None else only:
            try:
                run_row(cfg, known[name], seed)
            except Exception:  # the other rows do not depend on it
                failed = True
                traceback.print_exc()
    print(json.dumps(json.loads((work / "jobs" / "near_duplicates.json").read_text()), indent=1))
    print(write_tables(cfg, seeds))
    sys.exit(int(failed))


if __name__ == "__main__":
    tyro.cli(main)
