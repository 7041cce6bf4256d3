"""Training step: ours against the loop research code ships, in one process on one tape.

    python benchmarks/training/step.py                                   # CPU, ViT-S/16 at 224
    python benchmarks/training/step.py --device cuda --batch 128 \
        --models vit_s:16 vit_b:16 vit_l:16 vit_h:14

Both sides start from the same weights and see the same images and masks (`--tape`), so that their
fp32 losses can be compared step by step. A ratio is that of two times of one round, a few seconds
apart, and what is told is the median over rounds with the least and the most. The order of the
variants changes from round to round; each has a step that is not timed before those that are; and
everything is built anew a few times, so that no ratio hangs on where its memory lies. `--clock cpu`
times CPU seconds of the process, for a machine that is not quiet. Peak FLOP/s for the MFU column is
given by `--peak-tflops`.
"""

import dataclasses
import gc
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import tyro
from reference_loop import Encoder, Predictor, ReferenceLoop, collate_masks

from models.encoders.blocks import use_plain_attention
from models.encoders.linear import onednn_is_faster
from models.encoders.shape import find_preset
from models.image_size import Grid
from models.media.preprocessing import normalize
from models.objectives.ijepa import IJEPA
from models.objectives.registry import build_objective
from pipelines.config.data import MaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from pipelines.loading.masks.multiblock import multiblock_masks

LR, DECAY, MOMENTUM = 1e-4, 0.04, 0.996


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to time."""

    models: tuple[str, ...] = ("vit_s:16",)
    """Preset and patch size of every row."""
    device: str = "cpu"
    """cpu or cuda."""
    batch: int = 16
    """Images a step. A small one flatters ours: the update costs the same whatever the batch."""
    image_size: int = 224
    """Pixels a side."""
    builds: int = 3
    """How often everything is built anew."""
    rounds: int = 2
    """Rounds of a build; each times every variant once."""
    steps: int = 1
    """Timed steps of a variant in a round, after one that is not timed."""
    clock: Literal["wall", "cpu"] = "wall"
    """What is timed."""
    parity_steps: int = 5
    """Steps of the fp32 loss comparison."""
    compile: bool = False
    """Time a torch.compile variant too."""
    peak_tflops: float | None = None
    """Dense bf16 peak of the device, for MFU (H200: 989)."""
    threads: int = 2
    """Torch threads on CPU."""


Times = dict[str, float]
Tape = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_tape(args: Args, grid: int) -> Tape:
    """One batch of uint8 noise images, and its masks."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    keys = np.arange(args.batch, dtype=np.uint64)
    context, targets = multiblock_masks(keys, Grid(grid, grid), MaskConfig())
    ids = (torch.from_numpy(x).long().to(args.device) for x in (context, targets))
    return (images.to(args.device), *ids)  # type: ignore[return-value]


def build_ours(args: Args, preset: str, patch: int) -> IJEPA:
    torch.manual_seed(0)
    model = ModelConfig(encoder=preset, image_size=args.image_size, patch_size=patch)
    objective = dataclasses.asdict(ObjectiveConfig())
    made = build_objective("ijepa", model=dataclasses.asdict(model), objective=objective)
    assert isinstance(made, IJEPA)
    return made.to(args.device)


class OurLoop:
    """The trainer's step: autocast, fused AdamW, multi-tensor EMA, no sync."""

    def __init__(self, objective: IJEPA, bf16: bool, compiled: bool = False) -> None:
        self.objective, self.bf16 = objective, bf16
        if bf16 and next(objective.parameters()).device.type == "cpu":
            use_plain_attention(objective)  # as the trainer does
        self.forward = torch.compile(objective) if compiled else objective
        trained = [p for p in objective.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY, fused=True)

    def step(self, tape: Tape) -> torch.Tensor:
        batch = dict(zip(("images", "context_ids", "target_ids"), tape, strict=True))
        device = tape[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            loss = self.forward(batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(0, 1)
        return loss.detach()


def build_reference(objective: IJEPA, patch: int) -> ReferenceLoop:
    e, p = objective.encoder, objective.predictor
    encoder = Encoder(e.grid.rows, patch, e.width, e.depth, e.heads, e.mlp_ratio)
    predictor = Predictor(
        e.grid.rows, e.width, p.embed.out_features, len(p.blocks), p.blocks[0].attn.num_heads
    )
    encoder.load_state_dict(e.state_dict())
    predictor.load_state_dict(p.state_dict())
    device = e.pos_embed.device
    return ReferenceLoop(encoder.to(device), predictor.to(device), LR, DECAY)


def reference_step(loop: ReferenceLoop, tape: Tape, bf16: bool) -> float:
    images, context, targets = tape
    return loop.step(
        normalize(images, IMAGENET_MEAN, IMAGENET_STD), context, targets, MOMENTUM, bf16
    )


def parity(args: Args, preset: str, patch: int, tape: Tape) -> float:
    """Largest fp32 loss difference over the first steps."""
    ours = OurLoop(build_ours(args, preset, patch), bf16=False)
    reference = build_reference(ours.objective, patch)
    worst = 0.0
    for _ in range(args.parity_steps):
        worst = max(worst, abs(float(ours.step(tape)) - reference_step(reference, tape, False)))
    return worst


def timed(run: Any, steps: int, device: str, clock: str = "wall") -> float:
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    for _ in range(steps):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - start) / steps


def flops_per_image(objective: IJEPA, K: int, M: int, T: int) -> float:
    """Forward and backward FLOPs of the method: 2 a multiply-add, backward twice the forward."""

    def transformer(tokens: int, width: int, depth: int, ratio: float) -> float:
        return depth * (tokens * width * width * (8 + 4 * ratio) + 4 * tokens * tokens * width)

    e, p = objective.encoder, objective.predictor
    width = p.embed.out_features
    embed = 2 * e.width * 3 * e.patch_size**2
    target = e.num_patches * embed + transformer(e.num_patches, e.width, e.depth, e.mlp_ratio)
    context = K * embed + transformer(K, e.width, e.depth, e.mlp_ratio)
    ends = 2 * e.width * width * (K + M * T)
    predictor = ends + M * transformer(K + T, width, len(p.blocks), 4.0)
    return target + 3 * (context + predictor)


def mask_seconds(args: Args, grid: int) -> tuple[float, float]:
    """Seconds a batch of (collator, vectorised) masks."""
    rng, keys = random.Random(0), np.arange(args.batch, dtype=np.uint64)
    theirs = min(timed(lambda: collate_masks(args.batch, grid, rng), 1, "cpu") for _ in range(3))
    square = Grid(grid, grid)
    ours = min(
        timed(lambda: multiblock_masks(keys, square, MaskConfig()), 1, "cpu") for _ in range(3)
    )
    return theirs, ours


def with_mkl(loop: OurLoop, tape: Tape) -> None:
    """A step with the library for fp32 matrices that torch takes by itself."""
    with mock.patch("models.encoders.linear.onednn_is_faster", return_value=False):
        loop.step(tape)


def build_variants(args: Args, preset: str, patch: int, tape: Tape) -> dict[str, Any]:
    """Steps of every variant, on weights of its own."""
    runs: dict[str, Any] = {}
    for kind in ("fp32", "bf16"):
        bf16 = kind == "bf16"
        reference = build_reference(build_ours(args, preset, patch), patch)
        runs[f"reference {kind}"] = lambda r=reference, b=bf16: reference_step(r, tape, b)
        ours = OurLoop(build_ours(args, preset, patch), bf16)
        runs[f"ours {kind}"] = lambda o=ours: o.step(tape)
        if not bf16 and onednn_is_faster():
            by_mkl = OurLoop(build_ours(args, preset, patch), bf16)
            runs["ours fp32 by MKL"] = lambda o=by_mkl: with_mkl(o, tape)
        if args.compile:
            compiled = OurLoop(build_ours(args, preset, patch), bf16, compiled=True)
            runs[f"ours {kind} compiled"] = lambda o=compiled: o.step(tape)
    return runs


@dataclass
class Timings:
    """What was timed of one model."""

    rounds: list[Times] = field(default_factory=list)
    """Seconds of a step by variant, round for round."""
    firsts: list[float] = field(default_factory=list)
    """How many times longer the first step after another variant took than those after it."""
    peaks: Times = field(default_factory=dict)
    """GiB of a GPU by variant."""


def time_rounds(args: Args, preset: str, patch: int, tape: Tape) -> Timings:
    found = Timings()
    for _ in range(args.builds):
        runs = build_variants(args, preset, patch, tape)
        for number in range(args.rounds):
            names = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
            times = {}
            for name in reversed(names) if number % 2 else names:
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                first = timed(runs[name], 1, args.device, args.clock)
                times[name] = timed(runs[name], args.steps, args.device, args.clock)
                if number:  # the first round warms up
                    found.firsts.append(first / times[name])
                if args.device == "cuda":
                    found.peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            found.rounds.append(times)
    return found


def ratio(rounds: list[Times], base: str, variant: str) -> str:
    """How many times faster than the base: median over the rounds, least and most."""
    each = [times[base] / times[variant] for times in rounds]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def bench(args: Args, name: str) -> str:
    """Prints the table of one model and returns its ratios."""
    preset, patch = name.split(":")[0], int(name.split(":")[1])
    find_preset(preset)
    grid = args.image_size // patch
    tape = make_tape(args, grid)
    difference = parity(args, preset, patch, tape)
    timings = time_rounds(args, preset, patch, tape)
    rounds, peaks = timings.rounds, timings.peaks
    flops = flops_per_image(build_ours(args, preset, patch), tape[1].shape[1], *tape[2].shape[1:])
    theirs, ours = mask_seconds(args, grid)
    print(
        f"{name}: {flops / 1e9:.1f} GFLOP/image; largest fp32 loss difference over "
        f"{args.parity_steps} steps {difference:.1e}; masks a batch: collator {theirs * 1e3:.1f} "
        f"ms, vectorised {ours * 1e3:.1f} ms"
    )
    if timings.firsts:
        least, most = min(timings.firsts), max(timings.firsts)
        print(
            "The first step after another variant, which is not counted, takes "
            f"{statistics.median(timings.firsts):.2f} ({least:.2f} to {most:.2f}) of the next."
        )
    by_build = [rounds[i : i + args.rounds] for i in range(0, len(rounds), args.rounds)]
    for kind in ("fp32", "bf16"):
        each = (
            statistics.median(t[f"reference {kind}"] / t[f"ours {kind}"] for t in part)
            for part in by_build
        )
        print(f"ours in {kind}, build by build: {', '.join(f'{one:.2f}' for one in each)}")
    head = ("model", "variant", "in the same precision", "against fp32", "images/s", "GFLOP/s")
    print(f"| {' | '.join(head)} | MFU | GiB |")
    print("|---|---|---|---|---|---|---|---|")
    told = []
    for variant in rounds[0]:
        rate = args.batch / statistics.median(times[variant] for times in rounds)
        same = ratio(rounds, "reference " + variant.split()[1], variant)
        mfu = f"{rate * flops / args.peak_tflops / 1e10:.0f}%" if args.peak_tflops else ""
        memory = f"{peaks[variant]:.1f}" if peaks else ""
        print(
            f"| {name} | {variant} | {same} | {ratio(rounds, 'reference fp32', variant)} | "
            f"{rate:.1f} | {rate * flops / 1e9:.0f} | {mfu} | {memory} |"
        )
        if variant.startswith("ours"):
            told.append(f"{variant.removeprefix('ours ')} {same}")
    return f"{name} {', '.join(told)}"


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.device}, batch {args.batch}, {args.threads} threads, "
        f"{args.clock} clock, {args.builds} builds of {args.rounds} rounds, load "
        f"{os.getloadavg()[0]:.1f} at the start"
    )
    found = [bench(args, name) for name in args.models]
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    print(f"result: times faster than the reference loop: {'; '.join(found)}")


if __name__ == "__main__":
    main()
