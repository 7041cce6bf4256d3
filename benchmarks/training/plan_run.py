"""How far `plan_run --measure` is from real runs on this machine.

    python benchmarks/training/plan_run.py --out plan-run --rounds 3

Every recipe is planned and trained in turns (plan, run, plan, run, ..., plan), so that what else
the machine does falls on both. The plan of a run is the mean of the two around it. A run is a whole
`pretrain` on Ray; its time of a step is the median reading of metrics.jsonl after the first third
of its steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipelines.config.jobs import PlanRunConfig  # noqa: E402
from pipelines.config.train import PretrainConfig  # noqa: E402
from pipelines.fetchers.shipped import SAMPLE_VIDEO, sample_folder  # noqa: E402
from pipelines.plan_run import Planned, plan_run  # noqa: E402
from pipelines.recipes.registry import RECIPES  # noqa: E402

SMALL = {"data.batch_size": 32, "data.lanes": 8}
# Name of the case: recipe, data, and what is changed of the recipe.
CASES: dict[str, tuple[str, str, dict[str, float | int]]] = {
    "I-JEPA, images of 32 pixels": ("cifar10_demo", "images", {}),
    "LeJEPA, images of 32 pixels": ("lejepa_cifar10_demo", "images", {}),
    "LeVJEPA, clips of 64 pixels": ("levjepa_gameplay", "video", SMALL),
    "V-JEPA, clips of 64 pixels": ("vjepa_gameplay", "video", SMALL),
    "I-JEPA, two workers": ("cifar10_demo", "images", {"run.workers": 2}),
    "I-JEPA, ViT-Ti/16 at 128 pixels": ("laptop", "images", {}),
}


def shards(out: Path, kind: str) -> Path:
    """Ingests the shipped images or video once."""
    folder = out / kind
    if not (folder / "manifest.json").is_file():
        flags = ["--out", str(folder)]
        if kind == "images":
            flags += ["--source", str(sample_folder(out / "raw") / "train")]
        else:
            flags += ["--source", str(SAMPLE_VIDEO / "gameplay"), "--short-side", "64"]
            flags += ["--video.segment-seconds", "2", "--video.fps", "15"]
        python(["-m", "pipelines.ingest", *flags])
    return folder


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
    lines = (out / "runs" / name / "metrics.jsonl").read_text().splitlines()
    readings = [json.loads(text) for text in lines]
    speeds = [
        reading["samples_per_s"]
        for reading in readings
        if "samples_per_s" in reading and reading["step"] > run.steps // 3
    ]
    return data.batch_size / statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="shards, runs and results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    print("| run | round | load | planned, s a step (bounds) | measured | measured / planned |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in options.cases:
        compare(case, options)


def compare(case: str, options: argparse.Namespace) -> None:
    recipe, kind, changes = CASES[case]
    cfg = config(recipe, changes, shards(options.out, kind), options.steps)
    before = plan(cfg)
    for turn in range(options.rounds):
        name = f"{recipe}-{cfg.run.workers}-{turn}"
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
