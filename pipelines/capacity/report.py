"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from pipelines.capacity.clusters import PRICED, Cluster
from pipelines.capacity.constants import Constants, Range
from pipelines.capacity.estimate import DataSize, RunPlan
from pipelines.config.train import PretrainConfig

GIB, GB = 2**30, 1e9


def table(plan: RunPlan, cfg: PretrainConfig, cluster: Cluster) -> Table:
    """Returns the plan as one table."""
    kind = cluster.accelerator.name if cluster.accelerator else "no GPU"
    each = f"{cluster.accelerators} x {kind}, " if cluster.accelerators else ""
    workers = "1 worker" if cfg.run.most_workers == 1 else f"{cfg.run.most_workers} workers"
    title = (
        f"{cfg.run.name}: {workers} on {cluster.hosts} x {cluster.name} "
        f"({each}{cluster.vcpus} vCPUs, {cluster.network_gbit:g} Gbit/s)"
    )
    found = Table("what", "estimate", "from", "to", "notes", title=title, title_justify="left")
    for what, value, unit, note in _rows(plan, cfg, cluster):
        if isinstance(value, Range):
            numbers = [short(n) for n in (value.value, value.low, value.high)]
        else:
            numbers = [short(value), "", ""]
        found.add_row(what, f"{numbers[0]} {unit}".strip(), *numbers[1:], note)
    return found


def _rows(
    plan: RunPlan, cfg: PretrainConfig, cluster: Cluster
) -> list[tuple[str, Range | float, str, str]]:
    cost, step, memory = plan.cost, plan.step, plan.memory
    parts = ", ".join(f"{name} {flops / 1e9:.3g}" for name, flops in cost.parts.items())
    one = "image" if cfg.modality == "image" else "clip"
    spent = (
        f"compute {step.compute:.3g}, update {step.update:.3g}, exchange {step.exchange:.3g}; "
        f"beside it decode {step.decode:.3g}, read {step.read:.3g}"
    )
    limit = cluster.accelerator.memory_gib if cluster.accelerator else cluster.memory_gib
    of = "" if cluster.accelerator else " of the host"
    return [
        ("parameters", cost.trained / 1e6, "M", f"and {cost.frozen / 1e6:.4g} M without gradient"),
        (f"FLOPs of one {one}", cost.flops / 1e9, "GFLOP", f"forward: {parts}"),
        ("time of a step", plan.step_s, "s", spent),
        (f"{one}s a second", plan.samples_per_s, "", f"batch {cfg.data.batch_size:,}"),
        ("read from storage", plan.read_mb_s, "MB/s", "all hosts together"),
        ("vCPUs for the data", plan.decode_cores, "",
         f"of {cluster.hosts * cluster.vcpus}, to keep the devices busy"),
        ("memory of a worker", plan.memory_total.scaled(1 / GIB), "GiB",
         f"of {limit:.4g}{of}: {_memory(memory)}"),
        ("checkpoint", plan.checkpoint_bytes / GB, "GB", f"every {cfg.run.checkpoint_every} steps"),
        ("training waits for it", plan.checkpoint_s, "s", ""),
        ("upload beside training", plan.upload_s, "s", ""),
        ("the whole run", plan.hours, "h", f"{plan.epochs:.3g} epochs"),
        ("its hosts cost", plan.dollars, "$", f"at {cluster.price:g} $/h a host ({PRICED})"
         if cluster.price else "no price: set --price"),
    ]  # fmt: skip


def _memory(memory: Any) -> str:
    parts = {name: value / GIB for name, value in vars(memory).items() if value}
    return ", ".join(f"{name} {value:.3g}" for name, value in parts.items())


def short(number: float) -> str:
    """Returns a number with three digits, or whole from 1,000 on."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def advice(plan: RunPlan, cfg: PretrainConfig, cluster: Cluster) -> list[str]:
    """Returns what binds, and what to change, one line each."""
    step = plan.step
    lines = {
        "device": "the device: fewer FLOPs or more workers shorten a step, nothing else does",
        "network": "the exchange of gradients: more samples a worker, --run.accumulate, or a "
        "faster network",
        "decode": f"decoding ({step.decode:.3g} s against {step.device:.3g} s on the device)",
        "storage": f"reading ({step.read:.3g} s against {step.device:.3g} s on the device): "
        "smaller images (ingest --short-side), or hosts with a faster network",
        "cores": "the cores, which training and data share",
    }
    found = [f"What binds: {lines[plan.binds]}."]
    if plan.binds == "decode":
        found.append(_decode_advice(plan, cfg, cluster))
    elif step.decode > 0.7 * step.total and cluster.accelerator:
        found.append(
            f"Decoding is close behind ({step.decode / step.total:.0%} of a step); it binds if "
            "pictures are larger than assumed."
        )
    found += _memory_advice(plan, cfg, cluster)
    every = cfg.run.checkpoint_every * plan.step_s.value
    if plan.upload_s.value > every:
        found.append(
            f"A checkpoint uploads for {plan.upload_s.value:.0f} s, longer than the {every:.0f} s "
            "between two: raise --run.checkpoint-every."
        )
    return found


def _decode_advice(plan: RunPlan, cfg: PretrainConfig, cluster: Cluster) -> str:
    needed, there = plan.decode_cores.value, cluster.hosts * cluster.vcpus
    threads = -(-needed // cfg.run.most_workers)
    if cfg.data.decode_in == "trainer" and threads * cfg.run.most_workers <= 0.9 * there:
        return f"Change: --data.decode-threads {threads:.0f} (now {cfg.data.decode_threads})."
    more = max(1.0, needed - 0.9 * there)
    return (
        f"Change: --data.decode-in data with {more:.0f} more vCPUs on CPU nodes, or smaller images "
        "(ingest --short-side 256)."
    )


def _memory_advice(plan: RunPlan, cfg: PretrainConfig, cluster: Cluster) -> list[str]:
    if plan.fits:
        return []
    limit = cluster.accelerator.memory_gib if cluster.accelerator else 0.7 * cluster.memory_gib
    memory = plan.memory
    fixed = (memory.total - memory.activations) / GIB
    local = cfg.data.batch_size // cfg.run.most_workers
    parts = [n for n in range(1, local + 1) if local % n == 0]
    whole = memory.activations * cfg.run.accumulate / GIB
    fitting = [n for n in parts if fixed + whole / n <= 0.95 * limit]
    line = f"Memory does not suffice: {plan.memory_total.value / GIB:.1f} of {limit:.1f} GiB. "
    if fixed > 0.95 * limit:
        way = "GPUs with more memory" if plan.sharded else "--run.parallel fsdp or hsdp"
        return [line + f"Change: {way}."]
    ways = ["--model.activation-checkpointing"]
    if fitting and not cfg.compares_rows:
        ways.insert(0, f"--run.accumulate {fitting[0]}")
    return [line + f"Change: {', or '.join(ways)}, or more workers."]


def as_json(
    plan: RunPlan, cfg: PretrainConfig, cluster: Cluster, data: DataSize, constants: Constants
) -> dict[str, Any]:
    """Returns the plan with all that it stands on, in seconds, bytes and dollars."""
    return {
        "run": cfg.run.name,
        "workers": cfg.run.most_workers,
        "cluster": dataclasses.asdict(cluster),
        "data": dataclasses.asdict(data),
        "plan": dataclasses.asdict(plan),
        "advice": advice(plan, cfg, cluster),
        "constants": constants.to_json(),
    }
