"""How far `plan_run --measure` is from real runs on this machine.

    python benchmarks/training/plan_run.py --out plan-run --rounds 3

Every recipe is planned and trained in turns (plan, run, plan, run, ..., plan), so that what else
the machine does falls on both. The plan of a run is the mean of the two around it. A run is a whole
`pretrain` on Ray; its time of a step is the median reading of metrics.jsonl after the first third
of its steps. With `--without-ray` the trainer runs in this process, and a thread that calls the
functions of the read tasks takes the place of Ray Data; ingest's tasks run here then, too.

The images are the shipped sample of CIFAR-10, the clips moving squares of noise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipelines.config.jobs import PlanRunConfig  # noqa: E402
from pipelines.config.train import PretrainConfig  # noqa: E402
from pipelines.fetchers.moving_mnist import write_moving  # noqa: E402
from pipelines.fetchers.shipped import sample_folder  # noqa: E402
from pipelines.plan_run import Planned, plan_run  # noqa: E402
from pipelines.recipes.registry import RECIPES  # noqa: E402

CLIPS = 640
# Name of the case: recipe, data, and what is changed of the recipe.
CASES: dict[str, tuple[str, str, dict[str, float | int]]] = {
    "I-JEPA": ("cifar10_demo", "images", {}),
    "LeJEPA": ("lejepa_cifar10_demo", "images", {}),
    "MAE": ("mae_cifar10_demo", "images", {}),
    "LeVJEPA": ("levjepa_movingmnist", "video", {}),
    "V-JEPA": ("vjepa_movingmnist", "video", {}),
    "I-JEPA, 2 workers": ("cifar10_demo", "images", {"run.workers": 2}),
}


def shards(out: Path, kind: str, *, ray: bool) -> Path:
    """Ingests images or clips once."""
    folder = out / kind
    if (folder / "manifest.json").is_file():
        return folder
    flags = ["--out", str(folder)]
    if kind == "images":
        flags += ["--source", str(sample_folder(out / "raw") / "train")]
    else:
        rng = np.random.default_rng(0)
        squares = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8)
        write_moving(
            [("train", squares, np.zeros(100, int))], out / "clips", CLIPS, 0, edges="bounce"
        )
        flags += ["--source", str(out / "clips" / "train"), "--video.fps", "10"]
    if ray:
        python(["-m", "pipelines.ingest", *flags])
    else:
        ingest_here(flags)
    return folder


def ingest_here(flags: list[str]) -> None:
    """Runs the tasks of ingest one after the other in this process."""
    import tyro

    from pipelines import ingest as job
    from pipelines.config.ingest import IngestConfig

    def run(function: Callable[..., Any], rows: list[Any], cfg: IngestConfig, _: object) -> None:
        for row in rows:
            function(row, cfg=cfg)

    job._run, job.start_ray = run, lambda: None  # type: ignore[assignment]
    with contextlib.redirect_stdout(sys.stderr):
        job.ingest(tyro.cli(IngestConfig, args=flags))


def python(arguments: list[str]) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=True, env=environment, stdout=sys.stderr
    )


def config(recipe: str, changes: dict[str, float | int], data: Path, steps: int) -> PretrainConfig:
    cfg = RECIPES[recipe][1]
    changes = {**changes, "run.steps": steps, "run.probe_every": 0, "run.log_every": 10}
    changes |= {"run.checkpoint_every": steps, "optim.warmup_steps": min(steps, 50)}
    parts: dict[str, dict[str, float | int]] = {"run": {}, "data": {}, "optim": {}}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        parts[section][field] = value
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, train=str(data), **parts["data"]),  # type: ignore[arg-type]
        optim=dataclasses.replace(cfg.optim, **parts["optim"]),  # type: ignore[arg-type]
        run=dataclasses.replace(cfg.run, **parts["run"]),  # type: ignore[arg-type]
    )


def train(cfg: PretrainConfig, recipe: str, out: Path, name: str) -> float:
    """Trains, and returns the seconds of a step."""
    run, data = cfg.run, cfg.data
    flags = {
        "data.train": data.train,
        "data.batch-size": data.batch_size,
        "data.lanes": data.lanes,
        "optim.warmup-steps": cfg.optim.warmup_steps,
        "run.name": name,
        "run.storage": out / "runs",
        "run.steps": run.steps,
        "run.workers": run.workers,
        "run.probe-every": 0,
        "run.log-every": run.log_every,
        "run.checkpoint-every": run.checkpoint_every,
    }
    line = [f"--{flag}={value}" for flag, value in flags.items()]
    python(["-m", "pipelines.pretrain", recipe, *line])
    return step_seconds(out / "runs" / name, cfg)


def step_seconds(run: Path, cfg: PretrainConfig) -> float:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    speeds = [
        reading["samples_per_s"]
        for reading in map(json.loads, lines)
        if "samples_per_s" in reading and reading["step"] > cfg.run.steps // 3
    ]
    return cfg.data.batch_size / statistics.median(speeds)


def train_here(cfg: PretrainConfig, out: Path, name: str) -> float:
    """Trains in this process, and returns the seconds of a step."""
    from pipelines.training.contract import DataSource, Worker
    from pipelines.training.trainer import train as train_run

    run = dataclasses.replace(cfg.run, name=name, storage=str(out / "runs"))
    model = dataclasses.replace(cfg.model, fit="squash")
    cfg = dataclasses.replace(cfg, run=run, model=model)
    train_run(cfg, Worker(), DataSource(batches, 1, ""), NoStore(), print_nothing)  # type: ignore[arg-type]
    return step_seconds(out / "runs" / name, cfg)


def print_nothing(_: str) -> None:
    pass


class NoStore:
    """Keeps no checkpoint."""

    @contextlib.contextmanager
    def latest(self) -> Iterator[None]:
        yield None

    def save(self, write: object, metrics: object) -> None:
        pass


def batches(
    cfg: PretrainConfig, *, rank: int, world_size: int, start_step: int, end_step: int, **_: object
) -> Iterator[dict[str, Any]]:
    """What `train_batches` yields, without Ray."""
    from pipelines.loading.prefetch import Prefetch

    def source() -> Generator[dict[str, Any]]:
        from pipelines.loading import loader, plan, read_tasks

        reader, step = loader.make_reader(cfg, rank, world_size), start_step
        todo = plan.iter_pieces(reader.plan, start_step, end_step, reader.most_batches)
        size = reader.local_batch
        with ThreadPoolExecutor(cfg.data.decode_threads) as pool:
            for table in (t for piece in todo for t in read_tasks.read_piece(reader, piece)):
                for first in range(0, table.num_rows, size):
                    yield loader.to_batch(cfg, reader, table.slice(first, size), step, pool)
                    step += 1

    with contextlib.closing(Prefetch(source(), cfg.data.prefetch_batches)) as ahead:
        yield from ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="shards, runs and results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--without-ray", action="store_true", help="all in this process")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    print("| run | round | load | planned, s a step (bounds) | measured | measured / planned |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in options.cases:
        compare(case, options)


def compare(case: str, options: argparse.Namespace) -> None:
    recipe, kind, changes = CASES[case]
    data = shards(options.out, kind, ray=not options.without_ray)
    cfg = config(recipe, changes, data, options.steps)
    before = plan(cfg)
    for turn in range(options.rounds):
        name = f"{recipe}-{cfg.run.workers}-{turn}-{os.getpid()}"
        if options.without_ray:
            measured = train_here(cfg, options.out, name)
        else:
            measured = train(cfg, recipe, options.out, name)
        after = plan(cfg)
        steps = [one.plan.step_s for one in (before, after)]
        middle, low, high = (
            statistics.fmean(getattr(step, field) for step in steps)
            for field in ("value", "low", "high")
        )
        row = {"case": case, "turn": turn, "measured": measured, "planned": middle}
        row["seconds"] = dataclasses.asdict(after.plan.step)
        row["constants"] = after.constants.to_json()
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"| {case} | {turn + 1} | {os.getloadavg()[0]:.1f} | {middle:.3f} ({low:.3f} to "
            f"{high:.3f}) | {measured:.3f} | {measured / middle:.2f} |",
            flush=True,
        )
        before = after


def plan(cfg: PretrainConfig) -> Planned:
    return plan_run(PlanRunConfig(measure=True), cfg)


if __name__ == "__main__":
    main()
