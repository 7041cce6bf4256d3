"""What a run needs, counted without data, Ray or its device: `pretrain --dry-run`.

FLOPs, parameters and kept activations are those of `step_cost`, memory that of `memory`. The time
of a step is its FLOPs (recomputed activations included) by a share of the device's peak: data, the
update and the exchange between workers are left to `plan_run`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from models.encoders.linear import linear
from pipelines.capacity.clusters import CLUSTERS, Accelerator, Cluster, find_cluster, this_machine
from pipelines.capacity.constants import cores_of_worker
from pipelines.capacity.estimate import memory_limit, shards_of
from pipelines.capacity.memory import worker_memory
from pipelines.capacity.report import short
from pipelines.capacity.step_cost import StepCost, count_step, countable
from pipelines.config.jobs import DryRunConfig
from pipelines.config.train import PretrainConfig

GIB = 2**30
MATRIX, TIMED_S = 1024, 0.5
"""Rows and columns of the products that are timed on a machine without a GPU, and for how long."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a worker trains on."""

    name: str
    peak_flops: float
    """FLOP/s of one worker, in the run's precision."""
    cluster: Cluster
    """Hosts with it, as many as the run needs."""


def dry_run(cfg: PretrainConfig, how: DryRunConfig) -> list[str]:
    """Returns sentences that say what a run needs.

    Args:
        cfg: the run; its data are not read.
        how: the device and the share of its peak.

    Raises:
        ValueError: a setting is invalid; the message names its flag.
    """
    devices = devices_for(cfg, how.accelerator)
    cost = count_step(cfg)
    lines = [_title(cfg), _parameters(cfg, cost), _flops(cfg, cost)]
    if countable(cfg) != cfg:
        lines.append("counted as if --model.exclude left nothing out of views.")
    return [*lines, *_memory(cfg, cost, devices), *(_speed(cfg, cost, d, how.mfu) for d in devices)]


def devices_for(cfg: PretrainConfig, name: str | None) -> list[Device]:
    """Returns the devices that a dry run speaks of, as `DryRunConfig.accelerator` says.

    Raises:
        ValueError: the name is not known, or the recipe trains on CPUs.
    """
    if name is not None:
        if not cfg.run.gpu:
            raise ValueError(
                f"--accelerator {name}: the recipe trains on CPUs; add --run.gpu, or leave it out"
            )
        return [_gpu(cfg, _named(name))]
    here = this_machine()
    if cfg.run.gpu and here.accelerator:
        return [_gpu(cfg, here)]
    if cfg.run.gpu:
        return [_gpu(cfg, cluster) for cluster in _types().values()]
    cores = cores_of_worker(cfg, here)
    what = f"this machine's CPU (threads: {cores:.0f}; peak measured)"
    return [Device(name=what, peak_flops=matmul_rate(cfg, int(cores)), cluster=here)]


def _types() -> dict[str, Cluster]:
    """The first type of AWS with each GPU, by a name of one word."""
    found: dict[str, Cluster] = {}
    for cluster in CLUSTERS.values():
        assert cluster.accelerator
        found.setdefault(_word(cluster.accelerator), cluster)
    return found


def _word(gpu: Accelerator) -> str:
    kind, _, memory = gpu.name.partition(" ")
    return f"{kind}-{memory}" if gpu.name == "A100 80GB" else kind


def _named(name: str) -> Cluster:
    types = _types()
    if name not in types:
        raise ValueError(f"--accelerator: no {name!r}; one of {', '.join(types)}")
    return types[name]


def _gpu(cfg: PretrainConfig, cluster: Cluster) -> Device:
    gpu = cluster.accelerator
    assert gpu
    hosts = -(-cfg.run.most_workers // max(1, cluster.accelerators))
    if cluster.name in CLUSTERS:
        cluster = find_cluster(cfg, cluster.name, hosts)
    return Device(name=gpu.name, peak_flops=gpu.peak_flops(cfg.run.precision), cluster=cluster)


def matmul_rate(cfg: PretrainConfig, threads: int) -> float:
    """Measures the FLOP/s of the model's matrix products on this machine's CPU, in the run's
    precision."""
    dtype = torch.bfloat16 if cfg.run.precision == "bf16" else torch.float32
    left = torch.ones(MATRIX, MATRIX, dtype=dtype)
    before = torch.get_num_threads()
    seconds: list[float] = []
    torch.set_num_threads(threads)
    try:
        end = time.perf_counter() + TIMED_S
        while len(seconds) < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            linear(left, left)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * MATRIX**3 / statistics.median(seconds[1:])


def _one(cfg: PretrainConfig) -> str:
    return "image" if cfg.modality == "image" else "clip"


def _title(cfg: PretrainConfig) -> str:
    run, batch = cfg.run, cfg.data.batch_size
    workers = "1 worker" if run.most_workers == 1 else f"{run.most_workers} workers"
    parts = f" in {run.accumulate} micro-batches each" if run.accumulate > 1 else ""
    return (
        f"{run.name}: a step is {batch:,} {_one(cfg)}s on {workers}{parts} "
        f"({run.parallel}, {run.precision}). Nothing is trained."
    )


def _parameters(cfg: PretrainConfig, cost: StepCost) -> str:
    target = f" and {cost.frozen / 1e6:,.2f} M of the target encoder" if cost.frozen else ""
    return f"parameters: {cost.trained / 1e6:,.2f} M trained{target}."


def _flops(cfg: PretrainConfig, cost: StepCost) -> str:
    parts = ", ".join(f"{name} {flops / 1e9:.3g}" for name, flops in cost.parts.items())
    total = cost.flops * cfg.data.batch_size
    return (
        f"FLOPs: {short(total / 1e9)} G a step, {short(cost.flops / 1e9)} G of each {_one(cfg)} "
        f"(forward, G: {parts})."
    )


def _memory(cfg: PretrainConfig, cost: StepCost, devices: list[Device]) -> list[str]:
    """One line for each number of shards, which under hsdp depends on the hosts."""
    lines = []
    for shards in sorted({shards_of(cfg, device.cluster) for device in devices}):
        memory = worker_memory(cost, cfg, shards=shards)
        parts = {name: value / GIB for name, value in vars(memory).items() if value}
        told = ", ".join(f"{name} {value:.2g}" for name, value in parts.items())
        over = f" of {shards} that share the model" if shards > 1 else ""
        lines.append(f"memory: {memory.total / GIB:.3g} GiB a worker{over} ({told}).")
    return lines


def _speed(cfg: PretrainConfig, cost: StepCost, device: Device, mfu: float) -> str:
    local = cfg.data.batch_size / cfg.run.most_workers
    seconds = cost.flops * local / (mfu * device.peak_flops)
    limit = memory_limit(cfg, device.cluster)
    total = worker_memory(cost, cfg, shards=shards_of(cfg, device.cluster)).total
    fits = "fits" if total <= limit else "does not fit"
    return (
        f"{device.name}: {short(cfg.data.batch_size / seconds)} {_one(cfg)}s/s, {seconds:.3g} s a "
        f"step, at {mfu:.0%} of {device.peak_flops / 1e12:,.3g} TFLOP/s a worker; {fits} in "
        f"{limit / GIB:.3g} GiB."
    )
