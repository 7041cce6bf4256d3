"""Trains with several processes and without Ray; the group may change its size on the way."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helpers.pipelines.fake_training import MEMORY
from pipelines.config.train import PretrainConfig
from pipelines.training.contract import SavedCheckpoint, Worker
from pipelines.training.trainer import train


class SharedStore:
    """Checkpoints in a folder that all processes of a group share, committed by a rename."""

    def __init__(self, folder: Path, worker: Worker) -> None:
        self.folder, self._worker = folder, worker
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def latest(self) -> Iterator[SavedCheckpoint | None]:
        found = sorted(self.folder.glob("checkpoint_*"))
        yield SavedCheckpoint(found[-1], str(found[-1])) if found else None

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        name = tempfile.mkdtemp(dir=self.folder) if self._worker.rank == 0 else None
        staged = Path(str(self._worker.first(name)))
        write(staged)
        self._worker.all(None)
        if self._worker.rank == 0:
            staged.rename(self.folder / f"checkpoint_{metrics['step']:08d}")
        self._worker.all(None)


def _worker(
    rank: int, size: int, cfg: PretrainConfig, folder: Path, stop: int | None, meet: str
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    worker, asked = Worker(rank=rank, world_size=size), [0]

    def reason() -> str | None:
        asked[0] += 1
        return "the test" if asked[0] == stop else None

    store = SharedStore(folder, worker)
    outcome = train(cfg, worker, MEMORY, store, lambda line: None, None, reason)
    assert (outcome.stopped == "the test") == (stop is not None)
    if size > 1:
        dist.destroy_process_group()


def train_group(cfg: PretrainConfig, folder: Path, size: int, stop: int | None = None) -> None:
    """Trains with `size` processes until the end, or until the group is asked the stop-th time."""
    folder.mkdir(parents=True, exist_ok=True)
    meet = f"{tempfile.mkdtemp(dir=folder.parent)}/meet"
    arguments = (size, cfg, folder, stop, meet)
    if size == 1:
        _worker(0, *arguments)
    else:
        # Forked from one process that has imported once what takes seconds. It does not know
        # tests/, and what it does not find it leaves out without a word.
        multiprocessing.set_forkserver_preload(["pipelines.training.trainer"])
        mp.start_processes(_worker, arguments, nprocs=size, start_method="forkserver")
