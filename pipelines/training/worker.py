"""The function that each Ray Train worker runs, and checkpoints through Ray Train."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.scratch import make_scratch
from pipelines.config.train import PretrainConfig
from pipelines.runs.lease import LeaseWatch
from pipelines.runtime.uris import join_uri
from pipelines.training.contract import DataSource, SavedCheckpoint, Say, Worker
from pipelines.training.trainer import Outcome, train

if TYPE_CHECKING:
    from ray.util.queue import Queue


def train_worker(
    cfg: PretrainConfig, progress: Queue | None = None, token: str | None = None
) -> Outcome:
    """Trains a run inside a Ray Train worker.

    Args:
        cfg: The run, with absolute paths.
        progress: Queue that takes rank 0's lines to the driver; None prints them here.
        token: Of the lease that the driver holds on the run; None if it holds none.
    """
    import ray.train
    import ray.train.torch

    from pipelines.loading.loader import train_batches
    from pipelines.loading.mixing import identity_of, training_sets
    from pipelines.loading.plan import make_plan

    _quiet()
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_world_size=context.get_local_world_size(),
        device=ray.train.torch.get_device() if cfg.run.gpu else torch.device("cpu"),
    )
    sets = training_sets(cfg)
    first = sets[0]
    plan = make_plan(first.manifest.row_group_array(), first.data, cfg.run.seed)
    identity = identity_of([one.manifest for one in sets])
    data = DataSource(train_batches, plan.batches_per_epoch, identity)
    say = print if progress is None else say_into(progress)
    run_uri = join_uri(cfg.run.storage, cfg.run.name)
    lost = LeaseWatch(run_uri, token) if token else None
    with RayCheckpoints(run_uri) as checkpoints:
        return train(cfg, worker, data, checkpoints, say, lost)


def say_into(progress: Queue) -> Say:
    """Returns a function that sends lines to the driver, and prints them here if the queue is lost.

    Losing the queue must not end a run.
    """
    return functools.partial(_put_or_print, progress)


def _put_or_print(progress: Queue, line: str) -> None:
    from ray.exceptions import RayActorError

    try:
        progress.put(line)
    except RayActorError:
        print(line)


def _quiet() -> None:
    """Silences Ray's line about every checkpoint, which LoggingConfig does not reach."""
    module = sys.modules.get("ray.train.v2._internal.execution.context")
    if module is not None and module.__file__:
        logging.getLogger(module.__file__).setLevel(logging.WARNING)


class RayCheckpoints:
    """A `CheckpointStore` that reports to Ray Train, which uploads in the background.

    Args:
        run_uri: The run's folder.
    """

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri
        self._folders: list[Path] = []

    def __enter__(self) -> RayCheckpoints:
        """Returns itself."""
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Removes what is not going to be uploaded any more, if training has failed."""
        if failure is not None:
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def latest(self) -> Iterator[SavedCheckpoint | None]:
        """Yields the newest committed checkpoint of this run, from this or an earlier attempt."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
        else:
            name = Path(checkpoint.path).name
            with checkpoint.as_directory() as folder:
                yield SavedCheckpoint(Path(folder), join_uri(self._run_uri, name))

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        """Writes to local disk and returns; training continues while Ray uploads."""
        import ray.train

        folder = make_scratch("checkpoint")
        self._folders = [*(f for f in self._folders if f.exists()), folder]
        write(folder)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint_{metrics['step']:08d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
