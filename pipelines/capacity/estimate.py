"""From counts and constants to seconds, bytes, dollars, and what binds.

A step lasts as long as the slowest of what goes on beside each other: the device's own work, the
CPUs that read and decode, and the network that the data come through. Without a GPU, the device's
work and the data's share the same cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.capacity.clusters import Cluster
from pipelines.capacity.constants import Constants, Range, spread
from pipelines.capacity.memory import (
    FP32,
    Memory,
    checkpoint_bytes,
    optimizer_bytes,
    worker_memory,
)
from pipelines.capacity.step_cost import StepCost
from pipelines.config.train import PretrainConfig

OVERLAP = 0.5
"""Share of the forward and backward passes beside which gradients can be exchanged."""
CORES_OF_A_TRAINER = 1.0
"""Hardware threads that the loop of a worker with a GPU takes for itself."""


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """The data of a run."""

    samples: int
    """Images, or segments of video."""
    sample_bytes: float
    """Mean encoded bytes of one."""


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of one step, by what they are spent on; what goes on beside each other is not added
    up."""

    compute: float
    """Forward and backward passes."""
    update: float
    """Optimizer and EMA."""
    exchange: float
    """Exchange of gradients, as far as nothing else goes on beside it."""
    decode: float
    """Reading and decoding a worker's samples on the CPUs that it has for that."""
    read: float
    """Bringing a host's samples through the network."""
    total: float

    @property
    def device(self) -> float:
        """What the device is busy for."""
        return self.compute + self.update + self.exchange


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that is estimated of a run. Ranges are error bars."""

    cost: StepCost
    memory: Memory
    memory_total: Range
    step: StepSeconds
    """Of the middle values of all constants."""
    step_s: Range
    samples_per_s: Range
    read_mb_s: Range
    """Of all hosts together."""
    decode_cores: Range
    """Hardware threads of all hosts together that the data take at that speed."""
    checkpoint_bytes: float
    checkpoint_s: Range
    """Training waits for this long at every checkpoint."""
    upload_s: Range
    """Training goes on meanwhile."""
    hours: Range
    dollars: Range
    epochs: float
    binds: str
    """What the speed depends on: device, network, decode or storage."""
    fits: bool
    """Whether memory suffices, by the middle values."""
    sharded: bool
    """Whether the model is divided among workers."""


def estimate(
    cfg: PretrainConfig,
    cluster: Cluster,
    cost: StepCost,
    data: DataSize,
    constants: Constants,
) -> RunPlan:
    """Estimates a run.

    Args:
        cfg: the run.
        cluster: what it runs on.
        cost: from `count_step`.
        data: what it trains on.
        constants: what is known of the hardware.
    """
    case = _Case(cfg, cluster, cost, data)

    def ranged(function: Callable[[Constants], float]) -> Range:
        return spread(function, constants)

    step, step_s = case.step(constants), ranged(lambda c: case.step(c).total)
    hours = ranged(case.hours)
    batch = cfg.data.batch_size
    speed = Range(batch / step_s.value, batch / step_s.high, batch / max(step_s.low, 1e-9))
    memory_total = ranged(lambda c: case.memory(c).total)
    return RunPlan(
        cost=cost,
        memory=case.memory(constants),
        memory_total=memory_total,
        step=step,
        step_s=step_s,
        samples_per_s=speed,
        read_mb_s=speed.scaled(data.sample_bytes / 1e6),
        decode_cores=ranged(case.data_threads),
        checkpoint_bytes=checkpoint_bytes(cost, cfg),
        checkpoint_s=ranged(case.checkpoint),
        upload_s=ranged(case.upload),
        hours=hours,
        dollars=hours.scaled(cluster.hosts * cluster.price),
        epochs=case.steps * batch / data.samples,
        binds=case.binds(step),
        fits=memory_total.value <= case.memory_limit,
        sharded=case.shards > 1,
    )


def workers_on_host(cfg: PretrainConfig, cluster: Cluster) -> int:
    """Returns the workers of the fullest host."""
    return -(-cfg.run.most_workers // cluster.hosts)


def shards_of(cfg: PretrainConfig, cluster: Cluster) -> int:
    """Returns the number of workers among which the model is divided."""
    inside = workers_on_host(cfg, cluster)
    return {"ddp": 1, "fsdp": cfg.run.most_workers, "hsdp": inside}[cfg.run.parallel]


def memory_limit(cfg: PretrainConfig, cluster: Cluster) -> float:
    """Returns the bytes that one worker may take."""
    if cluster.accelerator:
        return cluster.accelerator.memory_gib * 2**30
    return 0.7 * cluster.memory_gib * 2**30 / workers_on_host(cfg, cluster)


@dataclass(frozen=True)
class _Case:
    cfg: PretrainConfig
    cluster: Cluster
    cost: StepCost
    data: DataSize

    @property
    def steps(self) -> int:
        return min(self.cfg.run.steps, self.cfg.run.stop_after or self.cfg.run.steps)

    @property
    def local(self) -> float:
        """Samples of one worker in a step."""
        return self.cfg.data.batch_size / self.cfg.run.most_workers

    @property
    def on_host(self) -> int:
        """Workers of the fullest host."""
        return workers_on_host(self.cfg, self.cluster)

    @property
    def shards(self) -> int:
        """Workers among which the model is divided."""
        return shards_of(self.cfg, self.cluster)

    @property
    def memory_limit(self) -> float:
        """Bytes that one worker may take."""
        return memory_limit(self.cfg, self.cluster)

    def memory(self, constants: Constants) -> Memory:
        return worker_memory(
            self.cost,
            self.cfg,
            shards=self.shards,
            activation_share=constants.activation_share.value,
        )

    def step(self, constants: Constants) -> StepSeconds:
        compute = self.cost.flops * self.local / constants.compute_flops.value
        update = self._update_bytes() / constants.update_bytes_s.value
        last = compute / self.cfg.run.accumulate  # only the last micro-batch exchanges gradients
        exchange = max(0.0, self.ring(constants) - OVERLAP * last)
        decode = self.data_seconds(constants) / self.data_cores(constants)
        read = self.on_host * self.local * self.data.sample_bytes / constants.read_bytes_s.value
        total = max(compute + update + exchange, decode, read)
        if not self.cluster.accelerator:
            still = self._standstill(constants)
            shared = self._shared(compute + update, constants)
            total = max(total, compute + update + exchange + still, shared)
        return StepSeconds(
            compute=compute, update=update, exchange=exchange, decode=decode, read=read, total=total
        )

    def _update_bytes(self) -> float:
        """Weights, state and target are read and written, gradients are read."""
        state = optimizer_bytes(self.cost, self.cfg.optim)
        trained, frozen = FP32 * self.cost.trained, FP32 * self.cost.frozen
        return (3 * trained + 2 * state + 3 * frozen) / self.shards

    def _standstill(self, constants: Constants) -> float:
        """Seconds for which decoding in the same process keeps a worker from training."""
        if self.cfg.data.decode_in == "data":
            return 0.0
        return self.local * constants.decode_cpu_s.value * constants.standstill_share.value

    def _shared(self, busy: float, constants: Constants) -> float:
        """Seconds if the workers of a host and their data share its cores evenly."""
        threads = self.cfg.run.threads or max(1, self.cluster.vcpus // self.on_host)
        work = busy * min(threads, self.cluster.vcpus) + self.data_seconds(constants)
        return self.on_host * work / self.cluster.vcpus

    def ring(self, constants: Constants) -> float:
        """Seconds to exchange the gradients: in every host, then between the hosts.

        Sharded workers also gather the weights, twice, and sum gradients only once: half as much
        again; under hsdp only within hosts.
        """
        size, kind = 2 * FP32 * self.cost.trained, self.cfg.run.parallel
        inside = size * (1 - 1 / self.on_host) / constants.link_bytes_s.value
        between = size * (1 - 1 / self.cluster.hosts) / constants.network_bytes_s.value
        more = 1.5 if self.shards > 1 else 1.0
        return more * inside + (more if kind == "fsdp" else 1.0) * between

    def data_seconds(self, constants: Constants) -> float:
        """CPU seconds of one core for the samples of one worker in a step."""
        return self.local * (constants.read_cpu_s.value + constants.decode_cpu_s.value)

    def data_cores(self, constants: Constants) -> float:
        """Cores that one worker has for its data."""
        share = constants.vcpu_share.value if self.cluster.accelerator else 1.0
        taken = self.on_host * CORES_OF_A_TRAINER if self.cluster.accelerator else 0.0
        free = max(1.0, self.cluster.vcpus - taken) / self.on_host
        if self.cfg.data.decode_in == "trainer":
            free = min(free, self.cfg.data.decode_threads)
        return free * share

    def data_threads(self, constants: Constants) -> float:
        """Hardware threads of all hosts that the data take."""
        share = constants.vcpu_share.value if self.cluster.accelerator else 1.0
        seconds = self.cfg.run.most_workers * self.data_seconds(constants)
        return seconds / self.step(constants).device / share

    def checkpoint(self, constants: Constants) -> float:
        host = checkpoint_bytes(self.cost, self.cfg) / self.cluster.hosts
        return host / constants.checkpoint_bytes_s.value

    def upload(self, constants: Constants) -> float:
        host = checkpoint_bytes(self.cost, self.cfg) / self.cluster.hosts
        return host / constants.upload_bytes_s.value

    def hours(self, constants: Constants) -> float:
        checkpoints = -(-self.steps // self.cfg.run.checkpoint_every)
        waiting = checkpoints * self.checkpoint(constants)
        return (self.steps * self.step(constants).total + waiting) / 3600

    def binds(self, step: StepSeconds) -> str:
        of = {
            "device": step.compute + step.update,
            "network": step.exchange,
            "decode": step.decode,
            "storage": step.read,
        }
        if step.total > max(step.device, step.decode, step.read) * 1.1:
            return "cores"
        slowest = max(step.device, step.decode, step.read)
        if slowest == step.device:
            return max("device", "network", key=of.__getitem__)
        return "decode" if slowest == step.decode else "storage"
