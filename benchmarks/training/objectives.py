"""All objectives at equal compute: kNN, linear probe and RankMe against CPU seconds, on CIFAR-10.

    python benchmarks/training/objectives.py --seconds 200 --seeds 0 1 2  # the shipped sample
    # of `pipelines.fetch`
    python benchmarks/training/objectives.py --data data/cifar10 --seconds 600

The recipes `*cifar10_demo` in the product's own training loop, with its crops, masks and schedules,
on images held in memory (no Ray). Each gets as many steps as fit into `--seconds` of this process's
CPU time, decoding included, as timed on its first steps; so a busy machine changes the speed, but
much less than the clock's the number of steps. `--controls` runs each without what keeps it from
collapse, as long, and notes what the watch says first (MAE has nothing of the kind: its control is
in tests/models/objectives/test_objectives.py). One JSON object a run goes to `--out`; finished runs
are skipped, with `--keep` unfinished ones go on from their last checkpoint (a twelfth of a run),
and all of the file is printed as a table.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from kept_runs import KeptRun
from PIL import Image

from models.encoders.vit import VisionTransformer
from models.keyed_random.arrays import key_of, permutation, sample_keys, uniforms
from models.keyed_random.streams import SampleStream
from models.media.preprocessing import normalize
from pipelines.config.train import PretrainConfig
from pipelines.evaluation.features import preprocessing_of
from pipelines.evaluation.probes.knn import knn_accuracy
from pipelines.evaluation.probes.linear import linear_probe
from pipelines.evaluation.ranks import rankme
from pipelines.fetchers.shipped import sample_folder
from pipelines.loading.decoding import decode_rows
from pipelines.loading.masks.crops import random_crops
from pipelines.loading.masks.maskers import make_masker
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import load_encoder
from pipelines.training.contract import DataSource, Outcome, Worker
from pipelines.training.state import new_state
from pipelines.training.trainer import train

TIMED_STEPS = 100
CONTROLS: dict[str, dict[str, Any]] = {
    "cifar10_demo": {"target": "self"},
    "lejepa_cifar10_demo": {"sigreg_weight": 0.0},
    "vicreg_cifar10_demo": {"vicreg_weights": (25.0, 0.0, 0.0)},
    "dmjd_cifar10_demo": {"target": "self"},
}
"""What is changed of the objective, and must make it collapse."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to run."""

    recipes: tuple[str, ...] = (
        "cifar10_demo",
        "lejepa_cifar10_demo",
        "vicreg_cifar10_demo",
        "mae_cifar10_demo",
        "dmjd_cifar10_demo",
    )
    """Rows of the table."""
    seeds: tuple[int, ...] = (0,)
    """Runs of every row."""
    seconds: float = 200.0
    """CPU seconds of training."""
    steps: int | None = None
    """Steps of every run, instead of as many as fit into `seconds`."""
    data: str | None = None
    """Folder `{train,test}/<class>/*.png`; None takes the shipped sample (2,500 and 800 images)."""
    out: Path = Path("objectives.jsonl")
    """One JSON object a run."""
    precision: str = "bf16"
    """Of the recipe: bf16 or fp32."""
    compile: bool = False
    """Compile, which takes minutes and makes steps faster. Only with `--steps`, because the time
    of the compiler would count too."""
    controls: bool = False
    """Run the negative controls of `recipes` instead."""
    keep: Path | None = None
    """Folder for checkpoints of what is running, so that a killed run goes on; None starts it anew.
    Controls are always started anew."""


@dataclass(frozen=True)
class Split:
    """Images held in memory."""

    table: pa.Table
    labels_N: np.ndarray
    pixels: torch.Tensor
    """uint8 [N, 3, 32, 32], whole."""


def read_split(folder: Path) -> Split:
    paths = sorted(folder.glob("*/*.png"))
    classes = sorted({path.parent.name for path in paths})
    encoded = [path.read_bytes() for path in paths]
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB")).transpose(2, 0, 1) for p in paths])
    table = pa.table(
        {
            "image": encoded,
            "sample_id": [hashlib.sha256(data).digest()[:16] for data in encoded],
            "height": [32] * len(paths),
            "width": [32] * len(paths),
            "source_uri": [str(path) for path in paths],
        }
    )
    labels = np.array([classes.index(path.parent.name) for path in paths])
    return Split(table, labels, torch.from_numpy(pixels))


def memory_batches(
    split: Split, cfg: PretrainConfig, *, rank: int, world_size: int, start_step: int, end_step: int
) -> Iterator[dict[str, Any]]:
    """`loading.train_batches` for one process and a table in memory, in another order."""
    masker, size = make_masker(cfg), cfg.data.batch_size
    per_epoch = len(split.labels_N) // size
    ordered = functools.lru_cache(maxsize=1)(permutation)  # sorted once an epoch, not once a step
    for step in range(start_step, end_step):
        epoch, index = divmod(step, per_epoch)
        order = ordered(key_of(cfg.run.seed, epoch), len(split.labels_N))
        rows = split.table.take(pa.array(order[index * size : (index + 1) * size]))
        ids = rows["sample_id"].to_pylist()
        keys_B = sample_keys(ids, cfg.run.seed, epoch)
        sizes = np.full((size, 2), 32, np.int32)
        boxes = random_crops(keys_B, sizes, cfg.data.crop_scale, cfg.data.crop_ratio)
        flipped = uniforms(keys_B, SampleStream.FLIP, 1)[:, 0] < (0.5 if cfg.data.flip else 0.0)
        crops = pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4)
        rows = rows.append_column("crop", crops).append_column("flipped", pa.array(flipped))
        images = torch.empty((size, 3, 32, 32), dtype=torch.uint8)
        decode_rows(rows, images.numpy())
        yield {
            "images": images,
            "sample_keys": torch.from_numpy(keys_B.view(np.int64)),
            "sample_ids": ids,
            **{n: torch.from_numpy(i).long() for n, i in masker.for_samples(keys_B).items()},
        }


def fitted(cfg: PretrainConfig, steps: int) -> PretrainConfig:
    """The recipe with another length; warm-up keeps its share."""
    warmup = max(1, cfg.optim.warmup_steps * steps // cfg.run.steps)
    quiet = {"probe_every": 0, "checkpoint_every": max(TIMED_STEPS, steps // 12)}
    quiet["log_every"] = max(1, steps // 20)
    return dataclasses.replace(
        cfg,
        optim=dataclasses.replace(cfg.optim, warmup_steps=warmup),
        run=dataclasses.replace(cfg.run, steps=steps, stop_after=None, **quiet),
    )


def configured(args: Args, name: str, seed: int, storage: str) -> PretrainConfig:
    base = RECIPES[name][1]
    settings = {"storage": storage, "seed": seed, "precision": args.precision}
    settings |= {"compile": args.compile, "threads": 1}
    cfg = dataclasses.replace(base, run=dataclasses.replace(base.run, **settings))
    if not args.controls:
        return cfg
    objective = dataclasses.replace(cfg.objective, **CONTROLS[name])
    watch = dataclasses.replace(cfg.watch, action="warn")
    return dataclasses.replace(cfg, objective=objective, watch=watch)


def run_folder(args: Args, name: str, seed: int, temporary: Path) -> Path:
    # A control's first warning would be lost with the process that said it.
    kept = args.keep if args.keep and not args.controls else temporary
    data = Path(args.data).name if args.data else "sample"
    return kept / f"{name}-{seed}-{data}-{args.seconds:g}"


Batches = Callable[..., Iterator[dict[str, Any]]]
"""As `memory_batches`."""
Measure = Callable[[VisionTransformer, PretrainConfig, dict[str, Split]], dict[str, float]]
"""As `probe`."""


def run(
    args: Args,
    name: str,
    seed: int,
    splits: dict[str, Split],
    batches: Batches | None = None,
    measure: Measure | None = None,
) -> dict[str, Any]:
    batches, measure = batches or memory_batches, measure or probe
    with tempfile.TemporaryDirectory() as folder:
        cfg = configured(args, name, seed, folder)
        data = DataSource(
            lambda cfg, **where: batches(splits["train"], cfg, **where),
            len(splits["train"].labels_N) // cfg.data.batch_size,
            "memory",
        )

        warnings: list[str] = []

        def say(line: str) -> None:
            if line.startswith("WARNING"):
                warnings.append(line)

        def trained(steps: int, store: KeptRun) -> Outcome:
            return train(fitted(cfg, steps), Worker(), data, store, say=say)

        def timed(steps: int) -> float:
            store = KeptRun(Path(tempfile.mkdtemp(dir=folder)))
            trained(steps, store)
            return store.cpu_seconds

        def length() -> int:
            timed(3)  # what is done once
            per_step = timed(TIMED_STEPS) / TIMED_STEPS
            warnings.clear()
            return max(1, round(args.seconds / per_step))

        kept = KeptRun(run_folder(args, name, seed, Path(folder)))
        outcome = trained(kept.steps(lambda: args.steps or length()), kept)
        seconds = kept.cpu_seconds
        assert kept.newest
        encoder = load_encoder(str(kept.newest))[0]
    found = {"name": name, "seed": seed, "budget": args.seconds, "data": args.data or "sample"}
    found |= {"control": args.controls, "warning": warnings[0] if warnings else None}
    found |= {
        "steps": outcome.step,
        "collapsed": outcome.collapsed,
        "cpu_seconds": round(seconds, 1),
    }
    found |= {"images": outcome.step * cfg.data.batch_size}
    found |= {"precision": args.precision, "compile": args.compile}
    return found | measure(encoder, cfg, splits) | {"random_init": baseline(cfg, splits, measure)}


def baseline(cfg: PretrainConfig, splits: dict[str, Split], measure: Measure) -> dict[str, float]:
    state = new_state(cfg, torch.device("cpu"))
    encoder = state.objective.feature_encoder
    assert isinstance(encoder, VisionTransformer)
    return measure(encoder, cfg, splits)


def mean_tokens(
    encoder: VisionTransformer, cfg: PretrainConfig, splits: dict[str, Split]
) -> dict[str, torch.Tensor]:
    """Returns the mean token of every picture of each split, [N, width]."""
    prep = preprocessing_of(cfg.model)
    with torch.no_grad():
        return {
            name: torch.cat(
                [
                    encoder(normalize(part, prep.mean, prep.std)).mean(1)
                    for part in split.pixels.split(500)
                ]
            )
            for name, split in splits.items()
        }


def probe(
    encoder: VisionTransformer, cfg: PretrainConfig, splits: dict[str, Split]
) -> dict[str, float]:
    features = mean_tokens(encoder, cfg, splits)
    sets = (features["train"], splits["train"].labels_N, features["test"], splits["test"].labels_N)
    return {
        "knn": round(100 * knn_accuracy(*sets), 2),
        "linear": round(100 * linear_probe(*sets, seed=0).accuracy, 2),
        "rankme": round(rankme(features["train"][:10_000]), 1),
    }


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def _matches(args: Args, name: str, seed: int, row: dict[str, Any]) -> bool:
    """Whether a row is the run of these settings."""
    asked = (name, seed, args.seconds, args.data or "sample", args.controls)
    return asked == (
        *(row[k] for k in ("name", "seed", "budget", "data")),
        row.get("control", False),
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| recipe | seeds | CPU s | steps | images | kNN | linear | RankMe | kNN over random init |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]

        def all_of(field: str, mine: list[dict[str, Any]] = mine) -> str:
            return ", ".join(f"{row[field]:g}" for row in mine)

        gain = statistics.mean(row["knn"] - row["random_init"]["knn"] for row in mine)
        cells = [
            all_of(f) for f in ("seed", "cpu_seconds", "steps", "images", "knn", "linear", "rankme")
        ]
        print(f"| {name} | {' | '.join(cells)} | {gain:+.1f} |")
    inits = {row["seed"]: row["random_init"] for row in rows}
    for field in ("knn", "linear", "rankme"):
        print(f"random init, {field}: {', '.join(f'{i[field]:g}' for i in inits.values())}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.compile and args.steps is None:
        raise SystemExit("--compile needs --steps: the steps timed first would be the compiler's")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.data) if args.data else sample_folder(Path(folder))
        splits = {name: read_split(root / name) for name in ("train", "test")}
    args.out.touch()
    names = [name for name in args.recipes if not args.controls or name in CONTROLS]
    for seed in args.seeds:
        for name in names:
            # Read anew each time: two of these may share the file.
            done = [row for row in read_rows(args.out) if _matches(args, name, seed, row)]
            if done:
                print(f"{name}, seed {seed}: {args.out} has its run of {done[0]['steps']:,} steps")
                continue
            found = run(args, name, seed, splits)
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
    rows = read_rows(args.out)
    print_table([row for row in rows if _matches(args, row["name"], row["seed"], row)])


if __name__ == "__main__":
    main()
