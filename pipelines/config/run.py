"""The run itself: its length, place, workers and checkpoints, whatever is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config.checks import require
from pipelines.config.input_flags import Workers, as_workers, workers_flag
from pipelines.config.places import PlaceField, WrittenPlace

NEWEST_WHOLE = "newest-whole"
"""Value of `--run.resume-from`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself: its length, place, workers and checkpoints."""

    name: str = "run"
    """Folder of this run under `storage`; the same name again resumes it."""
    storage: WrittenPlace = "runs"
    """Where runs live: a local folder or an `s3://` prefix."""
    steps: int = 1000
    """Optimizer steps in the whole run; the schedules end here."""
    stop_after: int | None = None
    """Stop, checkpointed, after this step as if interrupted; the schedules still aim at `steps`."""
    seed: int = 0
    """Seed of the weights, the order of samples, the crops and the masks."""
    workers: Annotated[Workers, workers_flag("run.workers")] = 1
    """Training processes: a number, which must divide --data.lanes, or FEWEST..MOST for a group
    that shrinks when hosts are lost and grows when there are more. It takes the sizes in the range
    that divide --data.lanes."""
    gpu: bool = False
    """Give every worker one GPU (NCCL). Otherwise workers train on CPUs (gloo)."""
    cpus_per_worker: float = 0.5
    """CPUs reserved for each worker; leave room for Ray Data tasks on the same machine."""
    threads: int | None = None
    """Torch threads per worker on CPU; None divides the machine's cores among its workers."""
    accumulate: int = 1
    """Micro-batches per optimizer step on every worker. It changes the loss of objectives that
    compare the rows of a batch (lejepa, levjepa, vicreg, --objective.regularize), because each
    micro-batch is compared by itself. A group that has shrunk makes more of them where that changes
    nothing, so that its micro-batches stay as small as those of the largest group."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast type; weights, EMA and optimizer state stay fp32."""
    compile: bool = False
    """torch.compile the objective (static shapes); its blocks, if the model is sharded."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How workers share the model. ddp: each holds all of it. fsdp: each holds a part of every
    weight, gradient and optimizer state. hsdp: fsdp within a host, ddp between hosts
    (docs/sharded_training.md)."""
    cpu_offload: bool = False
    """fsdp, hsdp: keep weights, gradients and optimizer state in the host's memory, where the
    optimizer then works too. Slow; for models that do not fit otherwise."""
    log_every: int = 10
    """Steps between readings of metrics, which are the only times when the host waits for the
    device."""
    probe_every: int = 0
    """Steps between online kNN probes; 0 for never."""
    rank_every: int = 0
    """Steps between readings of RankMe and LiDAR on fixed training samples, which are comparable
    between runs of one encoder shape; 0 for never. A sweep sets it."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the best by online probe, and the newest."""
    max_failures: int = 3
    """Restarts from the newest checkpoint after a worker or node is lost; -1 for no limit."""
    resume_from: str | None = None
    """Goes back to a certain whole checkpoint of this run, `checkpoint_<step>`. Newer checkpoints
    are moved to `set-aside-<n>` in the run's folder. By default, or with `newest-whole`, the run
    continues from its newest whole checkpoint."""
    take_over: bool = False
    """If another job trains this run, makes it stop, and goes on from its newest checkpoint. By
    default this command is refused then."""
    init_from: Annotated[str, PlaceField(required=False)] | None = None
    """Checkpoint whose weights the run starts with, if it has no checkpoint of its own. Its image
    size and clip length may differ."""
    log_samples: bool = False
    """Write the sample ids of every step to `samples-rank*.jsonl` (audits and tests)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "workers", as_workers(self.workers))
        for flag in ("steps", "accumulate", "log_every", "checkpoint_every"):
            require(getattr(self, flag) > 0, f"run.{flag.replace('_', '-')}", "must be positive")
        stops = self.stop_after is None or self.stop_after > 0
        require(stops, "run.stop-after", "must be positive")
        named = NEWEST_WHOLE if self.resume_from is None else self.resume_from
        require(
            named == NEWEST_WHOLE or re.fullmatch(r"checkpoint_\d+", named) is not None,
            "run.resume-from",
            f"{NEWEST_WHOLE}, or a checkpoint of the run as checkpoint_<step>; got {named!r}",
        )
        require(self.cpus_per_worker > 0, "run.cpus-per-worker", "must be positive")
        require(
            not self.cpu_offload or (self.gpu and self.parallel != "ddp"),
            "run.cpu-offload",
            "needs --run.gpu and --run.parallel fsdp or hsdp",
        )
        require(self.keep_checkpoints > 0, "run.keep-checkpoints", "must be positive")
        # Ray labels its metrics with it, which takes ASCII; and it is the name of a folder.
        plain = self.name.isascii() and self.name.isprintable() and self.name.strip(" ./") != ""
        require(plain, "run.name", f"{self.name!r} must be printable ASCII (letters, digits, -, _)")
        up = ".." in self.name.split("/") or self.name.startswith("/")
        require(not up, "run.name", f"{self.name!r} must stay inside --run.storage")

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return not isinstance(self.workers, int)

    @property
    def fewest_workers(self) -> int:
        """The smallest number of workers that may train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The largest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]
