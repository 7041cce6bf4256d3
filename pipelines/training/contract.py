"""What the training loop asks of its surroundings: batches, a checkpoint store, the processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pipelines.config.train import PretrainConfig

Say = Callable[[str], None]


class Batches(Protocol):
    """`loading.train_batches`: one local batch per optimizer step, across epochs."""

    def __call__(
        self, cfg: PretrainConfig, *, rank: int, world_size: int, start_step: int, end_step: int
    ) -> Iterator[dict[str, Any]]:
        """Yields the batches of steps [start_step, end_step), counted from 0."""


class CheckpointStore(Protocol):
    """Where checkpoints go and come from: Ray Train in a run, a folder in tests."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """The newest committed checkpoint of this run."""

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        """Has `write` fill a folder and commits it; may return before the upload is done."""


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Batches and what identifies them."""

    batches: Batches
    steps_per_epoch: int
    manifest_hash: str


@dataclasses.dataclass(frozen=True)
class Worker:
    """This process among the training processes."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def first(self, message: str | None) -> str | None:
        """The first process's message that is not None, on every process."""
        if self.world_size == 1:
            return message
        messages: list[str | None] = [None] * self.world_size
        dist.all_gather_object(messages, message)
        return next((m for m in messages if m is not None), None)


def end_step(cfg: PretrainConfig) -> int:
    """Steps after which this process ends: all of them, or `stop_after`."""
    return min(cfg.run.steps, cfg.run.stop_after or cfg.run.steps)
