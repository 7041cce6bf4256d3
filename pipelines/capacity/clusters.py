"""Machines that a run may be planned for: hosts, their accelerators, cores, network and price."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.train import PretrainConfig

PRICED = "on demand, us-east-1, about mid-2025; not checked since: set --price"
"""What the prices below are."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU."""

    name: str
    memory_gib: float
    tflops: float
    """Dense bf16 peak, 10^12 FLOP/s."""
    memory_gb_s: float
    """Bandwidth of its memory, 10^9 bytes/s."""
    link_gb_s: float
    """Bandwidth to the other GPUs of its host, 10^9 bytes/s in one direction."""

    def peak_flops(self, precision: str) -> float:
        """FLOP/s at its peak; fp32 by the tensor cores' shorter format reaches 40% of bf16."""
        return self.tflops * 1e12 * (1.0 if precision == "bf16" else 0.4)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal hosts. Without an accelerator, workers train on the cores."""

    name: str
    hosts: int = 1
    accelerator: Accelerator | None = None
    accelerators: int = 0
    """Accelerators of a host."""
    vcpus: int
    """Hardware threads of a host."""
    memory_gib: float
    network_gbit: float
    """Network of a host, 10^9 bits/s in one direction."""
    price: float = 0.0
    """US dollars for one host and hour."""

    @property
    def slots(self) -> int | None:
        """Most workers of a run with GPUs; None where workers train on cores."""
        return self.hosts * self.accelerators if self.accelerator else None


# Data sheets of the vendors; dense bf16 without sparsity.
L4 = Accelerator(name="L4", memory_gib=22, tflops=121, memory_gb_s=300, link_gb_s=16)
A10G = Accelerator(name="A10G", memory_gib=22, tflops=70, memory_gb_s=600, link_gb_s=16)
A100 = Accelerator(name="A100 40GB", memory_gib=39, tflops=312, memory_gb_s=1555, link_gb_s=300)
A100_80 = Accelerator(name="A100 80GB", memory_gib=79, tflops=312, memory_gb_s=2039, link_gb_s=300)
H100 = Accelerator(name="H100 80GB", memory_gib=79, tflops=989, memory_gb_s=3350, link_gb_s=450)
H200 = Accelerator(name="H200", memory_gib=139, tflops=989, memory_gb_s=4800, link_gb_s=450)
ACCELERATORS = (A100_80, A100, H100, H200, A10G, L4)

_TYPES = (
    Cluster(name="g6.2xlarge", accelerator=L4, accelerators=1, vcpus=8, memory_gib=32,
            network_gbit=5, price=0.98),
    Cluster(name="g6.12xlarge", accelerator=L4, accelerators=4, vcpus=48, memory_gib=192,
            network_gbit=40, price=4.60),
    Cluster(name="g5.12xlarge", accelerator=A10G, accelerators=4, vcpus=48, memory_gib=192,
            network_gbit=40, price=5.67),
    Cluster(name="p4d.24xlarge", accelerator=A100, accelerators=8, vcpus=96, memory_gib=1152,
            network_gbit=400, price=21.96),
    Cluster(name="p4de.24xlarge", accelerator=A100_80, accelerators=8, vcpus=96, memory_gib=1152,
            network_gbit=400, price=27.45),
    Cluster(name="p5.48xlarge", accelerator=H100, accelerators=8, vcpus=192, memory_gib=2048,
            network_gbit=3200, price=55.04),
    Cluster(name="p5en.48xlarge", accelerator=H200, accelerators=8, vcpus=192, memory_gib=2048,
            network_gbit=3200, price=63.30),
)  # fmt: skip
CLUSTERS = {cluster.name: cluster for cluster in _TYPES}
"""Types of AWS by name; a name is also known by its family (`p4d`), if that has one type here."""


def find_cluster(
    cfg: PretrainConfig, name: str, hosts: int | None = None, price: float | None = None
) -> Cluster:
    """Returns the hosts that a run is planned for.

    Args:
        cfg: the run.
        name: a key of `CLUSTERS`, the beginning of one, or `this` for this machine.
        hosts: number of hosts; None takes as many as the run's workers need.
        price: US dollars for one host and hour; None takes the noted one.

    Raises:
        ValueError: there is no such type, or the run does not fit it; the flag is named.
    """
    found = this_machine() if name == "this" else _named(name)
    found = dataclasses.replace(found, price=found.price if price is None else price)
    if cfg.run.gpu and not found.accelerator:
        raise ValueError(
            f"--cluster {name} has no GPU, and the recipe trains on GPUs: name another one, or "
            "add --run.no-gpu"
        )
    if not cfg.run.gpu:
        found = dataclasses.replace(found, accelerator=None, accelerators=0)
    workers = cfg.run.most_workers
    a_host = found.accelerators or workers
    needed = -(-workers // a_host)
    found = dataclasses.replace(found, hosts=hosts or needed)
    if found.slots is not None and workers > found.slots:
        raise ValueError(
            f"--run.workers: {workers} do not fit the {found.slots} GPUs of {found.hosts} "
            f"{found.name}; use --hosts {needed}, or fewer workers"
        )
    if workers < found.hosts:
        raise ValueError(
            f"--hosts: {found.hosts} hosts are more than the {workers} of --run.workers"
        )
    return found


def _named(name: str) -> Cluster:
    matches = [full for full in CLUSTERS if full == name or full.split(".")[0] == name]
    if len(matches) != 1:
        raise ValueError(f"--cluster: no {name!r}; one of this, {', '.join(CLUSTERS)}")
    return CLUSTERS[matches[0]]


def this_machine() -> Cluster:
    """Returns the machine that this runs on. Its network is not known, and taken for 10 Gbit/s."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cluster = Cluster(
        name="this machine", vcpus=_limit(cores or 1), memory_gib=memory, network_gbit=10
    )
    if not torch.cuda.is_available():
        return cluster
    properties = torch.cuda.get_device_properties(0)
    words = properties.name.replace("-", " ").split()
    known = next((a for a in ACCELERATORS if a.name.split()[0] in words), None)
    if known is None:
        raise ValueError(
            f"--cluster this: nothing is known of its GPU ({properties.name}); name one of "
            f"{', '.join(CLUSTERS)}"
        )
    accelerator = dataclasses.replace(
        known, name=properties.name, memory_gib=properties.total_memory / 2**30
    )
    count = torch.cuda.device_count()
    return dataclasses.replace(cluster, accelerator=accelerator, accelerators=count)


def _limit(cores: int) -> int:
    """Returns the cores that a container may use, where it has a limit."""
    quota = Path("/sys/fs/cgroup/cpu.max")
    if not quota.is_file() or quota.read_text().startswith("max"):
        return cores
    most, period = (int(part) for part in quota.read_text().split())
    return max(1, min(cores, most // period))
