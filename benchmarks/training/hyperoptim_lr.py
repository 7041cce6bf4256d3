"""How much the initial learning rate matters: final loss over 1e-6 to 1, ours and its rivals.

    python -m pipelines.fetch mnist --out data/mnist && python -m pipelines.fetch cifar10 \
        --out data/cifar10
    # resumable: one line a run in hyperoptim_lr.jsonl
    python benchmarks/training/hyperoptim_lr.py run
    python benchmarks/training/hyperoptim_lr.py show    # tables, and hyperoptim_lr.png

Two tasks of supervised training from scratch: MNIST by a perceptron (784-128-10, tanh; 470 steps of
256) and CIFAR-10 by a small ViT (patch 8, width 64, depth 2; 300 steps of 64). Every method takes
the column's rate as its own documentation would have it: as learning rate, or (prodigy) as its
first estimate d0. gdtuo: `pip install gradient-descent-the-ultimate-optimizer`, 1.0.
"""

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import tyro
from lr_methods import METHODS
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
RATES = tuple(10.0**power for power in range(-6, 1))
BETWEEN = (3e-4, 3e-3, 3e-2)
"""Tried for AdamW too, so that its best rate is a tuned one."""
READINGS = 20


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where things are, and what to run."""

    mnist: Path = Path("data/mnist")
    """`pipelines.fetch mnist`."""
    cifar10: Path = Path("data/cifar10")
    """`pipelines.fetch cifar10`."""
    cache: Path = Path("data/arrays")
    """Decoded images are kept here."""
    out: Path = HERE / "hyperoptim_lr.jsonl"
    """One line a run."""
    seeds: int = 3
    """Runs of every cell."""
    tasks: tuple[str, ...] = ("mnist", "cifar10")
    """Tasks to run."""
    methods: tuple[str, ...] = ()
    """Methods to run; none given: all."""
    minutes: float = 18.0
    """Stop after the run that passes this; the next call goes on."""


Chosen = Annotated[Args, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Task:
    """Images as floats, labels, a network, a length."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    network: Callable[[], nn.Module]
    steps: int
    batch: int


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))


def _vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=10, embed_dim=64, depth=2, num_heads=4
    )


def load_task(args: Args, name: str) -> Task:
    folder, network, steps, batch = {
        "mnist": (args.mnist, _perceptron, 470, 256),
        "cifar10": (args.cifar10, _vit, 300, 64),
    }[name]
    parts = [_arrays(args.cache, folder, name, split) for split in ("train", "test")]
    mean, std = parts[0][0].mean(), parts[0][0].std()
    train, test = [((x - mean) / std, y) for x, y in parts]
    return Task(train, (test[0][:2000], test[1][:2000]), network, steps, batch)


def _arrays(cache: Path, folder: Path, name: str, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] in [0, 1] and labels [N], decoded once."""
    path = cache / f"{name}-{split}.npz"
    if not path.exists():
        files = sorted((folder / split).glob("*/*.png"), key=lambda f: f.stem)
        classes = sorted({f.parent.name for f in files})
        images = np.stack([np.asarray(Image.open(f)) for f in track(files, f"{name} {split}")])
        labels = np.array([classes.index(f.parent.name) for f in files])
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=images, labels=labels)
    arrays = np.load(path)
    images = torch.from_numpy(arrays["images"]).float() / 255
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(arrays["labels"]).long()


def train(task: Task, method: str, rate: float, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    trained = METHODS[method](task.network(), rate, task.steps)
    generator = torch.Generator().manual_seed(seed)
    losses, readings, spent = [], [], 0.0
    for step in range(1, task.steps + 1):
        rows = torch.randint(0, len(task.train[0]), (task.batch,), generator=generator)
        x, y = task.train[0][rows], task.train[1][rows]
        start = time.process_time()
        losses.append(trained.step(x, y))
        spent += time.process_time() - start
        if step % (task.steps // READINGS) == 0:
            right = trained.predict(task.test[0]).argmax(dim=1) == task.test[1]
            readings.append((step, round(float(right.float().mean()), 4), round(spent, 3)))
    loss = statistics.fmean(losses[-task.steps // 10 :])
    return {"loss": loss, "worst": max(losses), "rate": trained.rate(), "accuracy": readings}


def run(args: Chosen) -> None:
    """Makes the runs that are not in the file yet."""
    torch.set_num_threads(1)
    args.out.touch()
    have = {_key(json.loads(line)) for line in args.out.read_text().splitlines()}
    stop = time.monotonic() + 60 * args.minutes
    for name in args.tasks:
        todo = [key for key in _cells(args, name) if key not in have]
        task = load_task(args, name) if todo else None
        for _, method, rate, seed in todo:
            assert task is not None
            row = {"task": name, "method": method, "lr": rate, "seed": seed}
            row |= train(task, method, rate, seed)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if time.monotonic() > stop:
                print("not done; the same command goes on")
                return
    print("done")


def _cells(args: Args, task: str) -> Iterator[tuple[str, str, float, int]]:
    for seed in range(args.seeds):
        for method in args.methods or METHODS:
            for rate in (*RATES, *(BETWEEN if method.startswith("AdamW") else ())):
                yield task, method, rate, seed


def _key(row: dict[str, Any]) -> tuple[str, str, float, int]:
    return row["task"], row["method"], row["lr"], row["seed"]


def show(args: Chosen) -> None:
    """Prints the tables and draws the picture."""
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    cells: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["task"], row["method"], row["lr"]].append(row)
    tasks = [task for task in args.tasks if any(key[0] == task for key in cells)]
    for task in tasks:
        _loss_table(cells, task)
        _target_table(cells, task)
    draw(cells, tasks, args.out.with_suffix(".png"))


def _mean(cell: list[dict[str, Any]]) -> float:
    return statistics.fmean(row["loss"] for row in cell)


def _best(cells: dict[Any, list[dict[str, Any]]], task: str, method: str) -> tuple[float, float]:
    """Loss and rate of a method's best rate, those between decades included."""
    rates = [r for r in (*RATES, *BETWEEN) if (task, method, r) in cells]
    return min((_mean(cells[task, method, r]), r) for r in rates)


def _loss_table(cells: dict[Any, list[dict[str, Any]]], task: str) -> None:
    tuned = {m: _best(cells, task, m) for m in METHODS if m.startswith("AdamW")}
    best = tuned["AdamW"][0]
    table = Table(
        "loss, mean of seeds", *(f"{r:g}" for r in RATES), "worst/best fixed", "within 10%"
    )
    for method in METHODS:
        means = [_mean(cells[task, method, r]) for r in RATES if (task, method, r) in cells]
        if len(means) == len(RATES):
            bad = sum(not math.isfinite(m) for m in means)
            worst = "NaN" if bad else f"{max(means) / best:.2f}"
            near = sum(m <= 1.1 * best for m in means)
            table.add_row(method, *(f"{m:.3f}" for m in means), worst, f"{near} of {len(RATES)}")
    for method, (loss, rate) in tuned.items():
        print(f"{task}: {method} at best {loss:.3f}, at {rate:g}")
    Console(width=140).print(table)


def _target_table(cells: dict[Any, list[dict[str, Any]]], task: str) -> None:
    """Steps until the accuracy that the best fixed AdamW has after three quarters of its run."""
    best = cells[task, "AdamW", _best(cells, task, "AdamW")[1]]
    at = round(0.75 * READINGS) - 1
    target = statistics.fmean(row["accuracy"][at][1] for row in best)
    table = Table(f"steps to {100 * target:.1f}%", *(f"{r:g}" for r in RATES), "CPU ms a step")
    for method in METHODS:
        found, costs = [], []
        for rate in RATES:
            runs = [
                _reached(row["accuracy"], target) for row in cells.get((task, method, rate), [])
            ]
            reached = [step for step in runs if step is not None]
            found.append(f"{statistics.fmean(reached):.0f}" if len(reached) == len(runs) else "-")
            for row in cells.get((task, method, rate), []):
                costs.append(1e3 * row["accuracy"][-1][2] / row["accuracy"][-1][0])
        if costs:
            table.add_row(method, *found, f"{statistics.median(costs):.2f}")
    Console(width=140).print(table)


def _reached(readings: list[list[float]], target: float) -> float | None:
    return next((step for step, accuracy, _ in readings if accuracy >= target), None)


def draw(cells: dict[Any, list[dict[str, Any]]], tasks: list[str], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(6.5 * len(tasks), 4.5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method in METHODS:
            rates = [r for r in RATES if (task, method, r) in cells]
            losses = [[row["loss"] for row in cells[task, method, r]] for r in rates]
            thick = 2.5 if method.startswith("ours") else 1.2
            means = [statistics.fmean(of_rate) for of_rate in losses]
            line = axis.plot(rates, means, marker="o", ms=3, lw=thick, label=method)[0]
            low, high = [min(x) for x in losses], [max(x) for x in losses]
            axis.fill_between(rates, low, high, alpha=0.15, color=line.get_color())
        axis.set(xscale="log", yscale="log", title=task, xlabel="initial learning rate")
        axis.set_ylabel("final training loss, mean and range of seeds")
        # Runs that are worse than guessing by far would squeeze the rest into a line.
        axis.set_ylim(
            0.9 * min(row["loss"] for key in cells if key[0] == task for row in cells[key])
        )
        axis.set_ylim(top=1.5 * math.log(10))
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "show": show}, description=__doc__)
