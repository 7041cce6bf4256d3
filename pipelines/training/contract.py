"""Interfaces the training loop depends on: batches, a checkpoint store, the worker process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from pipelines.config.train import PretrainConfig

Say = Callable[[str], None]
Lost = Callable[[], str | None]
"""Says who has taken a run over; None if nobody has."""
StopReason = Callable[[], str | None]
"""Says why a group should stop after a checkpoint; None if it should go on."""
Message = TypeVar("Message")


class Batches(Protocol):
    """Signature of `loading.train_batches`: one local batch per optimizer step, across epochs."""

    def __call__(
        self, cfg: PretrainConfig, *, rank: int, world_size: int, start_step: int, end_step: int
    ) -> Iterator[dict[str, Any]]:
        """Yields the batches of the steps [start_step, end_step), which count from 0."""


@dataclasses.dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint to resume from: its folder, or a local copy, and the URI for messages."""

    folder: Path
    uri: str


class CheckpointStore(Protocol):
    """Saves and finds the checkpoints of a run: through Ray Train, or in a folder in tests."""

    def latest(self) -> AbstractContextManager[SavedCheckpoint | None]:
        """Yields this run's newest committed checkpoint, or None."""

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> str | None:
        """Lets `write` fill a folder and commits it; may return before the upload is done.

        Returns:
            None, or why no checkpoint could be made, which every process gets alike.
        """


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The batches of a run, the steps of one epoch, and the identity of the shards."""

    batches: Batches
    steps_per_epoch: int
    manifest_hash: str
    crowd: Callable[[], str] | None = None
    """Says what others hold of the cluster that reads the batches; None if that is not known."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended.

    Collapse and refusal are returned rather than raised, because Ray Train restarts workers that
    raise, and a restart could not help here.
    """

    step: int
    metrics: dict[str, float]
    collapsed: str | None = None
    refused: str | None = None
    damaged: str | None = None
    """URI of the run's own checkpoint, if training was refused because that is damaged."""
    taken_over: str | None = None
    """Who has taken the run over, if another job has."""
    stopped: str | None = None
    """Why the group stopped after a checkpoint, if it was asked to."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """This process: its rank among the training processes, and its device."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    host: str = "this host"
    """Where it runs, for messages."""

    def first(self, message: Message | None) -> Message | None:
        """Returns on every process the message of the lowest rank that has one, or None."""
        return next((m for m in self.all(message) if m is not None), None)

    def all(self, message: Message) -> list[Message]:
        """Returns on every process the messages of all, by rank."""
        if self.world_size == 1:
            return [message]
        messages: list[Any] = [None] * self.world_size
        dist.all_gather_object(messages, message)
        return messages


def end_step(cfg: PretrainConfig) -> int:
    """The step after which this process ends: the run's last, or `run.stop_after`."""
    return min(cfg.run.steps, cfg.run.stop_after or cfg.run.steps)
