"""The data plan of a very large set: time and memory of the manifest, the plan and a read task.

    python benchmarks/data/plan_scale.py                    # 10^9 rows in 10^5 shards, 512 workers
    python benchmarks/data/plan_scale.py --rows 1e8 --shards 1e4 --workers 64

The manifest is synthetic (no shards are written); everything else is the code of ingest, of the
trainer and of the read tasks. Every stage runs in a process of its own, in which it is measured:

    write   the end of ingest: the text of the manifest
    read    the driver of a run: reads it, makes its identity and the plan
    rank    one training process: its reader, the pieces of all epochs, the first dataset's tasks
    task    one read task: its part of the plan, and which rows it reads

CPU seconds are those of the stage's process, memory is its largest resident set so far.
"""

from __future__ import annotations

import argparse
import functools
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipelines.config.data import DataConfig  # noqa: E402
from pipelines.config.run import RunConfig  # noqa: E402
from pipelines.config.train import PretrainConfig  # noqa: E402
from pipelines.dataset.shards import (  # noqa: E402
    Manifest,
    Shard,
    hash_bytes,
    read_manifest,
    write_manifest,
)

GROUP_ROWS, IMAGE_BYTES = 64, 110_000
TASK = "task.pickle"
Figures = Iterator[tuple[str, Any]]


def peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def timed(what: str, function: Callable[[], Any]) -> tuple[Any, tuple[str, str]]:
    start = time.process_time()
    result = function()
    seconds = time.process_time() - start
    return result, (what, f"{seconds:.2f} CPU s, {peak_gib():.2f} GiB at most")


def config(options: argparse.Namespace) -> PretrainConfig:
    workers = options.workers
    data = DataConfig(
        train=str(options.work), batch_size=32 * workers, lanes=workers, shuffle_window=256
    )
    return PretrainConfig(data=data, run=RunConfig(workers=workers))


# --- the stages; each yields what it measured


def write(options: argparse.Namespace) -> Figures:
    rows = options.rows // options.shards
    full, rest = divmod(rows, GROUP_ROWS)
    groups = (GROUP_ROWS,) * full + ((rest,) if rest else ())
    shards = tuple(
        Shard(
            file=f"part-{number:016x}.parquet",
            rows=rows,
            bytes=rows * IMAGE_BYTES,
            blake2b=hash_bytes(number.to_bytes(8, "big")).hex(),
            row_groups=groups,
        )
        for number in range(options.shards)
    )
    count = rows * options.shards
    manifest = Manifest(
        num_samples=count,
        num_bytes=count * IMAGE_BYTES,
        shards=shards,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        quarantined={},
        duplicates=0,
        ingest={},
        fingerprint="0",
    )
    yield timed("write_manifest", lambda: write_manifest(options.work, manifest))[1]
    yield "row groups", f"{len(groups) * options.shards:,}"
    yield "manifest.json", f"{(options.work / 'manifest.json').stat().st_size / 2**20:.1f} MiB"


def read(options: argparse.Namespace) -> Figures:
    from pipelines.loading.plan import make_plan

    cfg = config(options)
    manifest, figure = timed("read_manifest", lambda: read_manifest(options.work))
    yield figure
    yield timed("manifest_hash", lambda: manifest.manifest_hash)[1]
    groups_G3, figure = timed("row_group_array", manifest.row_group_array)
    yield figure
    yield timed("make_plan", lambda: make_plan(groups_G3, cfg.data, 0))[1]


def rank(options: argparse.Namespace) -> Figures:
    import ray.cloudpickle

    from pipelines.loading import loader, tables
    from pipelines.loading.plan import iter_pieces
    from pipelines.loading.read_tasks import read_pieces

    cfg = config(options)
    yield timed("imports", lambda: None)[1]
    reader, figure = timed("make_reader", lambda: loader.make_reader(cfg, 7, options.workers))
    yield figure
    plan = reader.plan
    steps = options.epochs * plan.batches_per_epoch
    count, figure = timed(
        f"pieces of {options.epochs} epochs",
        lambda: sum(1 for _ in iter_pieces(plan, 0, steps, reader.most_batches)),
    )
    yield figure
    yield (
        "their number",
        f"{count:,} ({count / tables.SEGMENT_PIECES / options.epochs:.1f} datasets an epoch)",
    )
    some = [*iter_pieces(plan, 0, steps, reader.most_batches)][: tables.SEGMENT_PIECES]
    part, figure = timed("part of the first dataset", lambda: reader.part(some))
    yield figure
    yield "its row groups", f"{sum(len(s.ends_G) for s in (part.plan.known or {}).values()):,}"
    task = ray.cloudpickle.dumps((functools.partial(read_pieces, part, some), part, some))
    yield "pickled for its tasks", f"{len(task) / 2**20:.2f} MiB"
    (options.work / TASK).write_bytes(task)


def task(options: argparse.Namespace) -> Figures:
    from pipelines.loading import read_tasks

    yield timed("imports", lambda: None)[1]
    (_, reader, some), figure = timed(
        "unpickle", lambda: pickle.loads((options.work / TASK).read_bytes())
    )
    yield figure
    rows, figure = timed(
        "rows of a piece", lambda: read_tasks.lane_windows(reader.plan, some[0], reader.lanes)
    )
    yield figure
    yield "their number", f"{len(rows):,}"


STAGES = {"write": write, "read": read, "rank": rank, "task": task}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=10**9)
    parser.add_argument("--shards", type=lambda text: int(float(text)), default=10**5)
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--work", type=Path, help="kept; default: a temporary folder, removed")
    parser.add_argument(
        "--stage", choices=STAGES, help="measure one, on the --work of those before"
    )
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(list(STAGES[options.stage](options))))
        return
    with tempfile.TemporaryDirectory(prefix="plan-scale-") as temporary:
        options.work = options.work or Path(temporary)
        print("| process | what | measured |\n|---|---|---|")
        for stage in STAGES:
            for what, figure in _in_process(stage, options):
                print(f"| {stage} | {what} | {figure} |", flush=True)


def _in_process(stage: str, options: argparse.Namespace) -> list[tuple[str, str]]:
    given = {name: getattr(options, name) for name in ("rows", "shards", "workers", "epochs")}
    flags = [f"--{name}={value}" for name, value in {**given, "work": options.work}.items()]
    command = [sys.executable, __file__, *flags, "--stage", stage]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [tuple(pair) for pair in json.loads(done.stdout.strip().splitlines()[-1])]


if __name__ == "__main__":
    main()
