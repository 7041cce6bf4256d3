"""What hyperoptimizers cost: time and memory of a step beside torch's fused AdamW and gdtuo.

    python benchmarks/training/hyperoptim.py time               # ViT-S/16 at 224, batch 64
    python benchmarks/training/hyperoptim.py memory --batch 8   # peak of one process a variant

Whole steps are timed in turn, round after round, and the optimizer's part alone many times over,
with the gradients left as they are. gdtuo (`pip install gradient-descent-the-ultimate-optimizer`,
1.0), which differentiates through its update in the backward pass, has no such part and is timed
whole only; it is left out where it is not installed. Weight decay is 0 throughout, for gdtuo has
none.
"""

import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from models.hyperoptim.optimizer import HyperAdamW
from models.hyperoptim.tuner import Tuner

LR = 1e-4
EVERYTHING = ("lr", "beta1", "beta2", "eps", "weight_decay")
THREE = Tuner(tune=EVERYTHING, above=Tuner(tune=EVERYTHING, above=Tuner(rule="sgd", lr=1e-4)))
TUNERS = {
    "ours, no tuner": None,
    "ours, lr": Tuner(),
    "ours, all": Tuner(tune=EVERYTHING),
    "ours, all, 4 levels": THREE,
}
VARIANTS = ("torch fused", "torch foreach", *TUNERS, "gdtuo, 2 levels")


@dataclass(frozen=True, kw_only=True)
class Args:
    """The model and how often it is timed."""

    model: str = "vit_small_patch16_224"
    """Of timm."""
    batch: int = 64
    """Images a step."""
    rounds: int = 2
    """Whole steps of every variant that count."""
    repeats: int = 30
    """Optimizer steps of every variant that count."""
    threads: int = 2
    """Torch threads."""
    whole: tuple[str, ...] = ("torch fused", "ours, lr", "ours, all", "gdtuo, 2 levels")
    """Variants whose whole step is timed."""
    only: str | None = None
    """Internal: the one variant to run, for `memory`."""


Chosen = Annotated[Args, tyro.conf.arg(name="")]


@dataclass
class Trial:
    """A model under an optimizer: `whole` takes a step, `optimizer` is the part after backward."""

    whole: Callable[[], None]
    optimizer: Callable[[], None] | None


def build(args: Args, variant: str, batch: tuple[torch.Tensor, torch.Tensor]) -> Trial:
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=100)
    images, labels = batch
    if variant.startswith("gdtuo"):
        return Trial(_gdtuo(model, images, labels), None)
    if variant.startswith("torch"):
        fused = variant == "torch fused"
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=LR, weight_decay=0.0, fused=fused, foreach=not fused
        )
    else:
        optimizer = HyperAdamW(model.parameters(), lr=LR, tuner=TUNERS[variant])

    def whole() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return Trial(whole, optimizer.step)


def _gdtuo(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    from gradient_descent_the_ultimate_optimizer import gdtuo

    # As in its README: Adam, whose alpha and betas an SGD moves; the graph is not created twice.
    wrapped = gdtuo.ModuleWrapper(model, optimizer=gdtuo.Adam(LR, optimizer=gdtuo.SGD(1e-5)))
    wrapped.initialize()

    def whole() -> None:
        wrapped.begin()
        loss = nn.functional.cross_entropy(wrapped.forward(images), labels)
        wrapped.zero_grad()
        loss.backward(create_graph=True)
        wrapped.step()

    return whole


def make_batch(args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, 224, 224, generator=generator)
    return images, torch.randint(0, 100, (args.batch,), generator=generator)


def available(names: tuple[str, ...]) -> list[str]:
    found = importlib.util.find_spec("gradient_descent_the_ultimate_optimizer") is not None
    return [name for name in names if found or not name.startswith("gdtuo")]


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_steps(args: Chosen) -> None:
    """Times whole steps and optimizer steps."""
    torch.set_num_threads(args.threads)
    batch = make_batch(args)
    names = [n for n in available(VARIANTS) if n in args.whole or not n.startswith("gdtuo")]
    trials = {name: build(args, name, batch) for name in names}
    whole: dict[str, list[float]] = {name: [] for name in available(args.whole)}
    for round_ in range(args.rounds + 1):
        for name in whole:
            took = seconds(trials[name].whole)
            if round_:  # the first round warms up
                whole[name].append(took)
    gradients = [p.grad for p in _parameters(trials["torch fused"])]
    alone: dict[str, list[float]] = {}
    for name, trial in trials.items():
        if trial.optimizer is not None:
            for param, gradient in zip(_parameters(trial), gradients, strict=True):
                param.grad = gradient.clone()
            alone[name] = []
    for _ in range(args.repeats + 3):
        for name in alone:
            alone[name].append(seconds(trials[name].optimizer))
    report(args, whole, {name: times[3:] for name, times in alone.items()})


def _parameters(trial: Trial) -> list[nn.Parameter]:
    optimizer = trial.optimizer.__self__  # type: ignore[union-attr]
    return [p for group in optimizer.param_groups for p in group["params"]]


def report(args: Args, whole: dict[str, list[float]], alone: dict[str, list[float]]) -> None:
    step = statistics.median(whole["torch fused"])
    base = statistics.median(alone["torch fused"])
    table = Table("variant", "optimizer, ms", "over fused, ms", "of a step", "whole steps, s")
    for name in dict.fromkeys([*alone, *whole]):
        optimizer = over = share = "-"
        if name in alone:
            took = statistics.median(alone[name])
            optimizer, over = f"{1e3 * took:.1f}", f"{1e3 * (took - base):+.1f}"
            share = f"{100 * (took - base) / step:+.2f}%"
        steps = ", ".join(f"{s:.2f}" for s in whole.get(name, [])) or "-"
        table.add_row(name, optimizer, over, share, steps)
    print(f"torch {torch.__version__}, {args.model}, batch {args.batch}, {args.threads} threads")
    Console(width=100).print(table)


def peaks(args: Chosen) -> None:
    """Peak memory of a process that takes three steps, by variant."""
    for name in available(VARIANTS):
        command = [sys.executable, str(Path(__file__)), "one", "--only", name]
        command += ["--batch", str(args.batch), "--model", args.model]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{name:22} {done.stdout.strip()}", flush=True)


def one(args: Chosen) -> None:
    """Internal: three steps of one variant, then the peak."""
    torch.set_num_threads(args.threads)
    assert args.only is not None
    trial = build(args, args.only, make_batch(args))
    for _ in range(3):
        trial.whole()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kept = 0
    if trial.optimizer is not None:
        state = trial.optimizer.__self__.state  # type: ignore[attr-defined]
        tensors = {id(t): t for of_param in state.values() for t in of_param.values()}
        kept = sum(t.nbytes for t in tensors.values())
    print(f"peak {peak:.0f} MiB, optimizer state {kept / 2**20:.1f} MiB")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"time": time_steps, "memory": peaks, "one": one}, description=__doc__
    )
