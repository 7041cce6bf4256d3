"""Training step: ours against the loop research code ships, in one process on one tape.

    python benchmarks/training/step.py                                   # CPU, ViT-S/16 at 224
    python benchmarks/training/step.py --device cuda --batch 128 \
        --models vit_s:16 vit_b:16 vit_l:16 vit_h:14

Both sides start from the same weights and see the same images and masks (`--tape`), so that their
fp32 losses can be compared step by step. Variants are timed in turn, round after round, and the
median round counts. Peak FLOP/s for the MFU column is given by `--peak-tflops`.
"""

import dataclasses
import gc
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from reference_loop import Encoder, Predictor, ReferenceLoop, collate_masks
from rich.console import Console
from rich.table import Table

from models.encoders.blocks import use_plain_attention
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
    """Images a step."""
    image_size: int = 224
    """Pixels a side."""
    rounds: int = 5
    """Rounds; each times every variant once."""
    steps: int = 2
    """Steps a round."""
    parity_steps: int = 5
    """Steps of the fp32 loss comparison."""
    compile: bool = False
    """Time a torch.compile variant too."""
    peak_tflops: float | None = None
    """Dense bf16 peak of the device, for MFU (H200: 989)."""
    threads: int = 2
    """Torch threads on CPU."""


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


def timed(run: Any, steps: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


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


def bench(args: Args, name: str, table: Table) -> None:
    preset, patch = name.split(":")
    find_preset(preset)
    tape = make_tape(args, args.image_size // int(patch))
    difference = parity(args, preset, int(patch), tape)
    runs: dict[str, Any] = {}
    for bf16 in (False, True):
        reference = build_reference(build_ours(args, preset, int(patch)), int(patch))
        kind = "bf16" if bf16 else "fp32"
        runs[f"reference {kind}"] = lambda r=reference, b=bf16: reference_step(r, tape, b)
        ours = OurLoop(build_ours(args, preset, int(patch)), bf16)
        runs[f"ours {kind}"] = lambda o=ours: o.step(tape)
        if args.compile:
            compiled = OurLoop(build_ours(args, preset, int(patch)), bf16, compiled=True)
            runs[f"ours {kind} compiled"] = lambda o=compiled: o.step(tape)
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    peaks: dict[str, float] = {}
    for round_ in range(args.rounds + 1):
        for variant, run in runs.items():
            gc.collect()
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(run, args.steps, args.device)
            if args.device == "cuda":
                peaks[variant] = torch.cuda.max_memory_allocated() / 2**30
            if round_:  # the first round warms up
                times[variant].append(seconds)
    flops = flops_per_image(ours.objective, tape[1].shape[1], *tape[2].shape[1:])
    masks_theirs, masks_ours = mask_seconds(args, args.image_size // int(patch))
    base = statistics.median(times["reference fp32"])
    for variant, seconds in times.items():
        median = statistics.median(seconds)
        rate = args.batch / median
        same = statistics.median(times["reference " + variant.split()[1]])
        mfu = f"{rate * flops / args.peak_tflops / 1e10:.0f}%" if args.peak_tflops else "-"
        memory = f"{peaks[variant]:.1f}" if peaks else "-"
        table.add_row(
            name, variant, f"{rate:.1f}", f"{same / median:.2f}x", f"{base / median:.2f}x",
            f"{rate * flops / 1e9:.0f}", mfu, memory,
        )  # fmt: skip
    print(
        f"{name}: {flops / 1e9:.1f} GFLOP/image; largest fp32 loss difference over "
        f"{args.parity_steps} steps {difference:.1e}; masks a batch: collator "
        f"{masks_theirs * 1e3:.1f} ms, vectorised {masks_ours * 1e3:.1f} ms"
    )


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    table = Table(
        "model", "variant", "images/s", "same precision", "vs fp32", "GFLOP/s", "MFU", "GiB"
    )
    for name in args.models:
        bench(args, name, table)
    print(f"torch {torch.__version__}, {args.device}, batch {args.batch}, {Path(__file__).name}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
