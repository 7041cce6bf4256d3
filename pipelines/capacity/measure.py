"""Measures the constants of a plan on this machine, with the code that a run uses.

Networks that are too large for this machine, or too slow, are measured with fewer blocks and
samples; what is measured is then FLOP/s on the run's own widths and token counts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.scratch import scratch
from pipelines.capacity.clusters import Cluster
from pipelines.capacity.constants import Constant, Constants, measured_rate
from pipelines.capacity.measure_data import measure_data
from pipelines.capacity.measure_exchange import measure_exchange
from pipelines.capacity.memory import FP32, optimizer_bytes
from pipelines.capacity.step_cost import StepCost, count_step, deepest, empty_objective, make_batch
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import CheckpointState, save_checkpoint
from pipelines.training.schedules import set_schedules
from pipelines.training.state import TrainState, state_of

STEP_BUDGET_S = 3.0
"""A step that would take longer, by the assumed speed, is made smaller."""
TIMED_S, MOST_STEPS, LEAST_STEPS = 5.0, 60, 5
FEW_SAMPLES = 4
MEMORY_SHARE = 0.3
"""Share of the free memory that the measured step may take."""
CHECKPOINT_BYTES = 2 * 10**8


@dataclass(frozen=True)
class Size:
    """Size of the step that is measured."""

    samples: int
    depth: int | None
    """Blocks of every network; None for all."""


def measure(
    cfg: PretrainConfig, cluster: Cluster, cost: StepCost, guess: Constants
) -> tuple[dict[str, Constant], list[str]]:
    """Measures what this machine can tell of a run.

    Args:
        cfg: the run; decoding is measured on `cfg.data.train`, if it names shards.
        cluster: what the plan is for.
        cost: what a step needs.
        guess: the constants assumed, by which sizes are chosen.

    Returns:
        Constants by name, and what was not measured and why, a line each.
    """
    found: dict[str, Constant] = {}
    notes: list[str] = []
    if cfg.run.gpu and not torch.cuda.is_available():
        notes.append("speed of training: not measured, this machine has no GPU")
    else:
        size = fitting_size(cfg, cost, guess)
        found |= measure_training(cfg, size)
    if cfg.data.train:
        found |= measure_data(cfg)
    else:
        notes.append("reading and decoding: not measured, name shards by --data.train")
    if cfg.run.most_workers > 1 and not cfg.run.gpu:
        found["link_bytes_s"] = measure_exchange(min(cfg.run.most_workers, cluster.vcpus))
    elif cfg.run.most_workers > 1:
        notes.append("exchange of gradients between GPUs: not measured")
    if cluster.hosts > 1:
        notes.append("the network between hosts: not measured")
    return found, notes


def fitting_size(cfg: PretrainConfig, cost: StepCost, guess: Constants) -> Size:
    """Chooses the largest step that this machine does in `STEP_BUDGET_S` and has memory for."""
    local = max(1, cfg.data.batch_size // cfg.run.most_workers // cfg.run.accumulate)
    depth = blocks = deepest(empty_objective(cfg))
    most_bytes = MEMORY_SHARE * _memory(cfg)
    while True:
        share = depth / max(1, blocks)
        seconds = cost.flops * share * local / guess.compute_flops.value
        fixed = 4 * FP32 * (cost.trained + cost.frozen) + cost.cast_bytes
        fits = (fixed + cost.kept_bytes * local) * share <= most_bytes
        if (fits and seconds <= STEP_BUDGET_S) or (local <= FEW_SAMPLES and depth <= 1):
            return Size(local, None if depth == blocks else depth)
        if local > FEW_SAMPLES:
            local = max(FEW_SAMPLES, local // 2)
        else:
            depth = max(1, depth // 2)


def _memory(cfg: PretrainConfig) -> float:
    if cfg.run.gpu:
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


# --- the step


def measure_training(cfg: PretrainConfig, size: Size) -> dict[str, Constant]:
    """Measures forward and backward, the update, and writing a checkpoint."""
    device = torch.device("cuda" if cfg.run.gpu else "cpu")
    state = _new_state(cfg, device, size.depth)
    cost = count_step(cfg, size.depth)
    batch = {name: values.to(device) for name, values in make_batch(cfg, size.samples).items()}
    with _threads(cfg):
        passes, updates = _time_steps(cfg, state, batch)
    what = f"measured on {_device_name(device)}, {size.samples} samples"
    what += "" if size.depth is None else f" and {size.depth} blocks"
    bytes_moved = (3 * cost.trained + 3 * cost.frozen) * FP32 + 2 * optimizer_bytes(cost, cfg.optim)
    return {
        "compute_flops": measured_rate(cost.flops * size.samples, passes, what),
        "update_bytes_s": measured_rate(bytes_moved, updates, what),
        "checkpoint_bytes_s": _measure_writing(cfg, state),
    }


def _new_state(cfg: PretrainConfig, device: torch.device, depth: int | None) -> TrainState:
    """A state whose weights are noise, which takes as long as any."""
    objective = empty_objective(cfg, depth).to_empty(device=device)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_(std=0.02)
        for buffer in objective.buffers():
            buffer.fill_(1)
    if cfg.run.compile and device.type == "cuda":
        objective.compile(dynamic=False)
    return state_of(objective, cfg, device)


@contextlib.contextmanager
def _threads(cfg: PretrainConfig) -> Iterator[None]:
    """The number of threads that a worker of the run has on a CPU."""
    before = torch.get_num_threads()
    if not cfg.run.gpu:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before
        torch.set_num_threads(cfg.run.threads or max(1, cores // cfg.run.most_workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_steps(
    cfg: PretrainConfig, state: TrainState, batch: dict[str, Tensor]
) -> tuple[list[float], list[float]]:
    """Returns the seconds of passes and of updates, step by step, as the trainer takes them."""
    passes: list[float] = []
    updates: list[float] = []
    begin = 0.0
    for step in range(1, MOST_STEPS + 3):
        start = _now(state.device)
        _pass(cfg, state, batch)
        middle = _now(state.device)
        _update(cfg, state, step)
        end = _now(state.device)
        if step == 2:  # the first two warm caches, and make the optimizer's state
            begin = end
        elif step > 2:
            passes.append(middle - start)
            updates.append(end - middle)
            if len(passes) >= LEAST_STEPS and end - begin > TIMED_S:
                break
    return passes, updates


def _pass(cfg: PretrainConfig, state: TrainState, batch: dict[str, Tensor]) -> None:
    bf16 = cfg.run.precision == "bf16"
    with torch.autocast(state.device.type, torch.bfloat16, enabled=bf16):
        output = state.objective(batch)
    output.loss.backward()
    state.meter.update({"loss": output.loss, **output.metrics})
    for name, watch in state.watches.items():
        watch.update(output.monitored[name])


def _update(cfg: PretrainConfig, state: TrainState, step: int) -> None:
    set_schedules(state.optimizer, step, cfg.optim, cfg.run.steps)
    if cfg.optim.clip_norm is not None:
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, cfg.optim.clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.objective.after_step(step - 1, cfg.run.steps)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "this machine's CPU"


# --- checkpoints


def _measure_writing(cfg: PretrainConfig, state: TrainState) -> Constant:
    """Writes checkpoints of a few hundred megabytes at most to TMPDIR, as a worker does."""
    saved = CheckpointState(step=1, position=1, epoch=1.0, manifest_hash="")
    tensors = state.tensors()
    left = CHECKPOINT_BYTES
    for group, values in tensors.items():
        kept = {}
        for name, tensor in values.items():
            if left > 0:
                kept[name] = tensor
                left -= tensor.numel() * tensor.element_size()
        tensors[group] = kept
    seconds, size = [], 0
    for _ in range(3):
        with scratch("plan") as folder:
            start = time.perf_counter()
            save_checkpoint(folder, tensors, saved, cfg, rank=0)
            seconds.append(time.perf_counter() - start)
            size = sum(path.stat().st_size for path in folder.iterdir())
    return measured_rate(size, seconds, f"measured writing {size / 1e6:.0f} MB to TMPDIR")
