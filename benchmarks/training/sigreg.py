"""SIGReg: ours against autograd through the formula, with all of its N x M x T numbers.

    flock -x LOCK python benchmarks/training/sigreg.py  # about a minute; alone on the machine

Each side runs in a process of its own. Time: median of `--repeats` forward and backward passes;
with `--clock cpu` of the process's CPU time, for a machine that is not quiet. Memory: the most it
held beyond what it held before the first pass (Linux: VmHWM; CUDA: the allocator).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from models.objectives.sigreg import END, epps_pulley


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to measure."""

    rows: int = 2048
    """N."""
    slices: int = 1024
    """M."""
    knots: int = 17
    """T."""
    width: int = 128
    """D."""
    repeats: int = 15
    """Timed passes of each side."""
    threads: int = 2
    """Of torch, on a CPU."""
    device: str = "cpu"
    """cpu or cuda."""
    clock: Literal["wall", "cpu"] = "wall"
    """What is timed."""
    side: str = ""
    """Used inside: which side this process is."""


def naive(samples_NM: torch.Tensor, knots: int) -> torch.Tensor:
    """The formula as it reads; the same [M] as `epps_pulley`."""
    t_T = torch.linspace(0, END, knots, device=samples_NM.device)
    phi_T = torch.exp(-0.5 * t_T**2)
    weights_T = 2 * END / (knots - 1) * phi_T
    weights_T[[0, -1]] /= 2
    x_NMT = samples_NM[..., None] * t_T
    error_MT = (x_NMT.cos().mean(0) - phi_T).square() + x_NMT.sin().mean(0).square()
    return len(samples_NM) * (error_MT @ weights_T)


SIDES = {"naive": naive, "ours": epps_pulley}


def measure(args: Args) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(args.rows, args.width, generator=generator).to(args.device)
    slices = torch.randn(args.width, args.slices, generator=generator).to(args.device)
    slices = torch.nn.functional.normalize(slices, dim=0)
    rows.requires_grad_()

    def once() -> float:
        rows.grad = None
        loss = SIDES[args.side](rows @ slices, args.knots).mean()
        loss.backward()
        return float(loss)

    (rows[:8] @ slices).sum().backward()  # starts the library's threads and buffers
    held(args.device)
    before = held(args.device)
    value = once()
    peak = held(args.device) - before
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    seconds = []
    for _ in range(args.repeats):
        start = clock()
        once()
        seconds.append(clock() - start)
    assert rows.grad is not None
    norm = float(rows.grad.norm())
    return {"value": value, "norm": norm, "bytes": peak, "seconds": statistics.median(seconds)}


def held(device: str) -> float:
    """Most bytes held since the last call."""
    if device == "cuda":
        most = float(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return most
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return float(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.side:
        print(json.dumps(measure(args)))
        return
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[side] = json.loads(done.stdout)
    theirs, ours = found["naive"], found["ours"]
    print(f"torch {torch.__version__}, {args}")
    for side, numbers in found.items():
        print(
            f"{side}: {numbers['seconds'] * 1e3:.0f} ms, {numbers['bytes'] / 2**20:.0f} MiB, "
            f"value {numbers['value']:.7g}, gradient's norm {numbers['norm']:.7g}"
        )
    ratios = {name: theirs[name] / ours[name] for name in ("seconds", "bytes")}
    print(f"{ratios['seconds']:.1f} times as fast, {ratios['bytes']:.1f} times less memory")


if __name__ == "__main__":
    main()
