"""The training loop that every worker runs: data, forward, backward, step, EMA, log, checkpoint.

The loop draws no random numbers (crops and masks come with the batch), does not depend on the
number of workers, and makes the host wait for the device only when metrics are read. Views that
leave regions out, the anchor and Prodigy make it wait in every step.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from models.objectives.objective import OPTIONAL_INPUTS, Output
from models.shards import total_norm
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoints import (
    CheckpointError,
    check_resumable,
    read_config,
    read_state,
)
from pipelines.runs.initial_weights import load_initial
from pipelines.training.contract import (
    CheckpointStore,
    DataSource,
    Lost,
    Outcome,
    SavedCheckpoint,
    Say,
    StopReason,
    Worker,
    end_step,
)
from pipelines.training.parallel import exchanging, processes, shard_mesh, wrap
from pipelines.training.recorder import Recorder
from pipelines.training.schedules import set_schedules
from pipelines.training.state import TrainState, new_state
from pipelines.worker_group.sizes import at_size


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """Why a process has no state to train from; the fields of `Outcome`."""

    refused: str
    damaged: str | None = None


def train(
    cfg: PretrainConfig,
    worker: Worker,
    data: DataSource,
    store: CheckpointStore,
    say: Say = print,
    lost: Lost | None = None,
    stop_reason: StopReason | None = None,
) -> Outcome:
    """Trains from the run's newest state until `cfg.run.steps` or `cfg.run.stop_after`.

    Args:
        cfg: The run.
        worker: This process; every process calls this with the same `cfg`.
        data: Batches of the run's shards.
        store: Checkpoints of the run.
        say: Takes lines for the user; called on rank 0 only.
        lost: Says who has taken the run over; None if that cannot happen.
        stop_reason: Says why this group should stop; None if nobody asks it to.

    Returns:
        The last step and its metrics, and why the run stopped early, if it did.

    Raises:
        RuntimeError: The loader ended before the last step.
        ValueError: The loader gave a batch of the wrong size.
    """
    say = say if worker.rank == 0 else lambda line: None
    _set_up_process(cfg, worker)
    with processes(cfg):
        state, refusal = _start(cfg, worker, data, store, say)
        if state is None:
            assert refusal
            return Outcome(0, {}, refused=refusal.refused, damaged=refusal.damaged)
        model = wrap(state.objective, cfg, worker)
        with Recorder(cfg, worker, state, data, store, say, lost, stop_reason) as recorder:
            return _steps(at_size(cfg, worker.world_size), worker, data, state, model, recorder)


def _steps(
    cfg: PretrainConfig,
    worker: Worker,
    data: DataSource,
    state: TrainState,
    model: nn.Module,
    recorder: Recorder,
) -> Outcome:
    """Trains until the last step, or until the recorder says why not."""
    batches = data.batches(
        cfg,
        rank=worker.rank,
        world_size=worker.world_size,
        start_step=state.step,
        end_step=end_step(cfg),
    )
    timer = recorder.timer
    timer.start()
    for batch in batches:
        step = state.step + 1
        timer.mark("data")

        for micro, exchange in _micro_batches(batch, state.objective.inputs, cfg, worker, model):
            with exchange:
                with _autocast(cfg, worker):
                    output: Output = model(micro)
                timer.mark("forward")
                (output.loss / cfg.run.accumulate).backward()  # type: ignore[no-untyped-call]
                timer.mark("backward")
            state.meter.update({"loss": output.loss, **output.metrics})
            for name, watch in state.watches.items():
                watch.update(output.monitored[name])

        rate, decay = set_schedules(state.optimizer, step, cfg.optim, cfg.run.steps)
        grad_norm = _clip(cfg, state, reading=recorder.reads_at(step))
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.objective.after_step(step - 1, cfg.run.steps)
        state.step = step
        timer.mark("optimizer")

        collapsed = recorder.after_step(batch, {"lr": rate, "wd": decay}, grad_norm)
        if recorder.taken_over:
            return Outcome(step, state.metrics, taken_over=recorder.taken_over)
        if collapsed:
            return Outcome(step, state.metrics, collapsed=collapsed)
        if recorder.stopped:
            return Outcome(step, state.metrics, stopped=recorder.stopped)
        timer.start()
    if state.step < end_step(cfg):
        raise RuntimeError(f"the loader ended at step {state.step} of {end_step(cfg)}")
    return Outcome(state.step, state.metrics)


def _set_up_process(cfg: PretrainConfig, worker: Worker) -> None:
    if worker.device.type == "cpu":
        # Ray sets OMP_NUM_THREADS to the CPUs a worker reserves, which are few on purpose.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        cores = cores or os.cpu_count() or 1
        torch.set_num_threads(cfg.run.threads or max(1, cores // worker.local_world_size))


def _start(
    cfg: PretrainConfig, worker: Worker, data: DataSource, store: CheckpointStore, say: Say
) -> tuple[TrainState | None, _Refusal | None]:
    """Returns the state to train from, or the reason why there is none.

    The state is the first that exists of: the run's own newest checkpoint, the weights of
    `run.init_from`, fresh weights. If a checkpoint exists but cannot be used, every process refuses
    to train rather than start over.
    """
    state: TrainState | None = None
    error: _Refusal | None = None
    with store.latest() as found:
        try:
            state = new_state(cfg, worker.device, shard_mesh(cfg, worker, say))
            if found is not None:
                _restore(state, found, cfg, worker, data)
                say(f"resuming run {cfg.run.name!r} at step {state.step}")
            elif cfg.run.init_from:
                say(load_initial(cfg, state.objective))
        except (CheckpointError, ValueError) as problem:
            damaged = getattr(problem, "checkpoint", None)
            own = found is not None and damaged == found.uri  # not that of --anchor.checkpoint
            error = _Refusal(str(problem), damaged if own else None)
    refusal = worker.first(error)
    return (None if refusal else state), refusal


def _restore(
    state: TrainState, saved: SavedCheckpoint, cfg: PretrainConfig, worker: Worker, data: DataSource
) -> None:
    settings = read_config(saved.folder, saved.uri)
    position = read_state(saved.folder, saved.uri)
    check_resumable(settings, position, cfg, data.manifest_hash)
    state.restore(saved.folder, rank=worker.rank, world_size=worker.world_size, uri=saved.uri)
    state.meter.reweigh(
        at_size(settings, position.world_size).run.accumulate * position.world_size,
        at_size(cfg, worker.world_size).run.accumulate * worker.world_size,
    )


def _autocast(cfg: PretrainConfig, worker: Worker) -> torch.autocast:
    enabled = cfg.run.precision == "bf16"
    return torch.autocast(worker.device.type, torch.bfloat16, enabled=enabled)


def _micro_batches(
    batch: dict[str, Any],
    inputs: tuple[str, ...],
    cfg: PretrainConfig,
    worker: Worker,
    model: nn.Module,
) -> Iterator[tuple[dict[str, Tensor], AbstractContextManager[None]]]:
    """Yields equal parts of a local batch on the device, each with its gradient-sync context.

    Gradients are exchanged between the processes only in the last part.
    """
    count = cfg.run.accumulate
    expected = cfg.data.batch_size // worker.world_size
    found = len(batch[inputs[0]])
    if found != expected:
        raise ValueError(f"loader gave {found} {inputs[0]} a worker, not {expected}")
    size = expected // count
    names = [*inputs, *(name for name in OPTIONAL_INPUTS if name in batch)]
    for part in range(count):
        rows = slice(part * size, (part + 1) * size)
        micro = {name: _to_device(batch[name][rows], worker.device) for name in names}
        yield micro, exchanging(model, last=part == count - 1)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return values
    # From pinned memory, the copy is queued behind the last step and the host does not wait.
    return values.pin_memory().to(device, non_blocking=True)


def _clip(cfg: PretrainConfig, state: TrainState, *, reading: bool) -> Tensor | None:
    """Clips the gradient if `optim.clip_norm` is set.

    Returns:
        The gradient's norm before clipping; None if it is neither clipped nor about to be logged.
    """
    if cfg.optim.clip_norm is None and not reading:
        return None
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if cfg.optim.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, cfg.optim.clip_norm, norm)
    return norm
