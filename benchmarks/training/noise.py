"""What a distractor costs I-JEPA and a masked autoencoder: linear probes by its strength.

    python benchmarks/training/noise.py --data data/cifar10          # of `pipelines.fetch cifar10`
    python benchmarks/training/noise.py --data data/cifar10 --most 1 # the next run alone

Textures are pasted on every patch of every picture, anew whenever it is shown, so nothing of them
tells the label. Patch p gets sum_k a_pk texture_k, with

    a_p = rho c + sqrt(1 - rho^2) n_p        c of the picture, n_p of the patch, both normal

Whatever rho is, a patch alone looks the same. With rho = 0 no patch tells of another, with rho = 1
each tells all of the others: as flicker, and as a HUD. Both recipes train for the same CPU time.
Then probes read the label, and by ridge regression c, from the mean token, beside random weights.
Each finished run is a line of `--out`; what is there is not run again, and all of it is drawn.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import objectives
import pyarrow as pa
import torch
import tyro
from objectives import Split

from models.encoders.vit import VisionTransformer
from pipelines.config.train import PretrainConfig
from pipelines.evaluation.probes.linear import linear_probe

NAMES = {"cifar10_demo": "I-JEPA", "mae_cifar10_demo": "MAE"}
CONDITIONS = ((0, 0.6), (64, 0.6), (64, 1.0), (64, 0.0), (32, 0.6), (16, 0.6))
"""Strength and rho."""
PATCH, TEXTURES = 8, 8
RIDGE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to run."""

    data: Path
    """Folder `{train,test}/<class>/*.png`."""
    seconds: float = 45.0
    """CPU seconds of training."""
    images: tuple[int, int] = (20_000, 5_000)
    """Training and test images that are used."""
    seed: int = 0
    """Of training."""
    most: int = 1_000
    """Runs of this call at most."""
    out: Path = Path("benchmarks/training/noise.jsonl")
    """One JSON object a run; the plot stands beside it."""


@dataclass(frozen=True)
class Distractor:
    """Textures on pictures of 32 pixels."""

    strength: float
    """Standard deviation of a pixel, grey levels."""
    rho: float
    """What one patch tells of another."""

    def paste(self, images: torch.Tensor, seed: tuple[int, ...]) -> tuple[torch.Tensor, np.ndarray]:
        """Returns disturbed pictures uint8 [B, 3, H, W], and the c of each, [B, K]."""
        random, (B, C, H, W) = np.random.default_rng(seed), images.shape
        rows = H // PATCH
        common = random.standard_normal((B, 1, TEXTURES))
        own = random.standard_normal((B, rows * rows, TEXTURES))
        shares = self.rho * common + np.sqrt(1 - self.rho**2) * own
        patches = torch.from_numpy(shares @ textures() * self.strength).view(
            B, rows, rows, C, PATCH, PATCH
        )
        pasted = patches.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return (images + pasted).round().clamp(0, 255).to(torch.uint8), common[:, 0]


@functools.cache
def textures() -> np.ndarray:
    """Returns orthogonal patterns [K, C * P * P]; normal mixtures have pixels of variance 1."""
    values = np.random.default_rng(7).standard_normal((3 * PATCH * PATCH, TEXTURES))
    orthogonal, _ = np.linalg.qr(values)
    return orthogonal.T * np.sqrt(3 * PATCH * PATCH / TEXTURES)


def first(split: Split, count: int) -> Split:
    """Returns some pictures of a split, of all classes."""
    chosen = np.random.default_rng(1).permutation(len(split.labels_N))[:count]
    return Split(split.table.take(pa.array(chosen)), split.labels_N[chosen], split.pixels[chosen])


def disturbed_batches(
    distractor: Distractor, split: Split, cfg: PretrainConfig, **where: int
) -> Iterator[dict[str, Any]]:
    batches = objectives.memory_batches(split, cfg, **where)
    for step, batch in enumerate(batches, where["start_step"]):
        yield batch | {"images": distractor.paste(batch["images"], (cfg.run.seed, step))[0]}


def measure(
    states: dict[str, np.ndarray],
    encoder: VisionTransformer,
    cfg: PretrainConfig,
    splits: dict[str, Split],
) -> dict[str, float]:
    """Returns the accuracy of the label, and R^2 of the distractor's state, both in percent."""
    found = objectives.mean_tokens(encoder, cfg, splits)
    train, test = found["train"], found["test"]
    labels = (splits["train"].labels_N, splits["test"].labels_N)
    accuracy = linear_probe(train, labels[0], test, labels[1], seed=0).accuracy
    explained = ridge_r2(train, states["train"], test, states["test"])
    return {"linear": round(100 * accuracy, 2), "state": round(100 * explained, 1)}


def ridge_r2(
    train: torch.Tensor, train_values: np.ndarray, test: torch.Tensor, test_values: np.ndarray
) -> float:
    mean, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    x_train, x_test = (((x - mean) / spread).double().numpy() for x in (train, test))
    gram = x_train.T @ x_train + RIDGE * len(x_train) * np.eye(x_train.shape[1])
    weights = np.linalg.solve(gram, x_train.T @ (train_values - train_values.mean(0)))
    errors = x_test @ weights + train_values.mean(0) - test_values
    return float(1 - (errors**2).sum() / ((test_values - test_values.mean(0)) ** 2).sum())


def run(args: Args, name: str, distractor: Distractor, whole: dict[str, Split]) -> dict[str, Any]:
    splits, states = {}, {}
    for number, (part, split) in enumerate(whole.items()):
        pixels, states[part] = distractor.paste(split.pixels, (number, 2**31))
        splits[part] = replace(split, pixels=pixels)
    settings = objectives.Args(seconds=args.seconds, data=str(args.data))
    row = objectives.run(
        settings,
        name,
        args.seed,
        splits,
        functools.partial(disturbed_batches, distractor),
        functools.partial(measure, states),
    )
    kept = ("name", "seed", "cpu_seconds", "steps", "images", "linear", "state", "random_init")
    told = {"strength": distractor.strength, "rho": distractor.rho, "budget": args.seconds}
    return told | {field: row[field] for field in kept}


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in ("name", "strength", "rho", "seed", "budget"))


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| strength | rho | objective | steps | label | c | label, random | c, random |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["rho"], row["strength"], row["name"])):
        cells = [row["strength"], row["rho"], NAMES[row["name"]], row["steps"]]
        for found in (row, row["random_init"]):
            cells += [found["linear"], found["state"] if row["rho"] and row["strength"] else "-"]
        print(f"| {' | '.join(map(str, cells))} |")


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, field, title in (
        (axes[0], "linear", "label, linear probe (%)"),
        (axes[1], "state", "distractor's state, $R^2$ (%)"),
    ):
        for colour, (name, shown) in zip(("C0", "C1"), NAMES.items(), strict=True):
            mine = sorted((r for r in rows if r["name"] == name), key=lambda r: r["strength"])
            curve = [r for r in mine if r["rho"] == 0.6 and (field == "linear" or r["strength"])]
            strengths = [r["strength"] for r in curve]
            axis.plot(strengths, [r[field] for r in curve], f"{colour}o-", label=f"{shown}, 0.6")
            for rho, mark in ((0.0, "x"), (1.0, "s")):
                dots = [r for r in mine if r["rho"] == rho and (field == "linear" or rho)]
                axis.plot(
                    [r["strength"] for r in dots],
                    [r[field] for r in dots],
                    colour + mark,
                    mfc="none",
                    label=f"{shown}, {rho:g}",
                )
            if name == "cifar10_demo":
                values = [r["random_init"][field] for r in curve]
                axis.plot(strengths, values, "k--", lw=1, label="random, 0.6")
        axis.set_xlabel("strength of the distractor, grey levels")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, title="encoder, rho", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    done = {key_of(row) for row in read_rows(args.out)}
    left = [
        (name, Distractor(strength, rho))
        for strength, rho in CONDITIONS
        for name in NAMES
        if (name, strength, rho, args.seed, args.seconds) not in done
    ][: args.most]
    parts = zip(("train", "test"), args.images, strict=True)
    whole = {part: first(objectives.read_split(args.data / part), n) for part, n in parts if left}
    for name, distractor in left:
        row = run(args, name, distractor, whole)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    rows = read_rows(args.out)
    print_table(rows)
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
