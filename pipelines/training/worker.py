"""The function that each Ray Train worker runs, and checkpoints through Ray Train."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.scratch import make_scratch
from pipelines.config.train import PretrainConfig
from pipelines.runs.lease import LeaseWatch
from pipelines.runtime.lines.worker_lines import say_into
from pipelines.runtime.uris import join_uri, open_uri
from pipelines.training.contract import DataSource, Outcome, SavedCheckpoint, Worker
from pipelines.training.trainer import train
from pipelines.worker_group.room import here, is_full, no_room, require_room, telling_room
from pipelines.worker_group.stopping import GroupStoppedError, stop_reason, wait_until_committed

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

    from pipelines.loading.cpu_share import crowd_now
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
        host=here(),
    )
    sets = training_sets(cfg)
    first = sets[0]
    plan = make_plan(first.manifest.row_group_array(), first.data, cfg.run.seed)
    identity = identity_of([one.manifest for one in sets])
    say = print if progress is None else say_into(progress)
    batches = functools.partial(train_batches, say=say)
    data = DataSource(batches, plan.batches_per_epoch, identity, crowd_now)
    run_uri = join_uri(cfg.run.storage, cfg.run.name)
    lost = LeaseWatch(run_uri, token) if token else None
    sharded = cfg.run.parallel != "ddp"
    checkpoints = RayCheckpoints(run_uri, worker, in_background=sharded)
    with telling_room(), checkpoints:
        outcome = train(cfg, worker, data, checkpoints, say, lost, stop_reason)
        if outcome.stopped:
            wait_until_committed()
            raise GroupStoppedError(outcome.stopped)
        return outcome


def _quiet() -> None:
    """Silences Ray's line about every checkpoint, which LoggingConfig does not reach."""
    module = sys.modules.get("ray.train.v2._internal.execution.context")
    if module is not None and module.__file__:
        logging.getLogger(module.__file__).setLevel(logging.WARNING)


class RayCheckpoints:
    """A `CheckpointStore` that reports to Ray Train, which uploads in the background.

    Args:
        run_uri: The run's folder.
        worker: This process.
        in_background: Write to the local disk in the background too, while training goes on.
    """

    def __init__(self, run_uri: str, worker: Worker, *, in_background: bool = False) -> None:
        self._run_uri, self._worker, self._in_background = run_uri, worker, in_background
        self._writing = threading.Lock()
        self._folders: list[Path] = []
        self._bytes = 0

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

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> str | None:
        """Writes to local disk and returns; training continues while Ray uploads.

        In the background, Ray's thread writes before it uploads. Then there is a wait only while
        the previous checkpoint is written, so that few are in memory.
        """
        import ray.train

        name = f"checkpoint_{metrics['step']:08d}"
        folder, problem = self._begin(write)
        if self._worker.rank == 0:
            self._remove_left_over(name)
        problem = self._worker.first(problem)
        if problem or folder is None:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return problem
        self._folders = [*(f for f in self._folders if f.exists()), folder]
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload(write, folder) if self._in_background else None,
            delete_local_checkpoint_after_upload=True,
        )
        return None

    def _begin(self, write: Callable[[Path], None]) -> tuple[Path | None, str | None]:
        """Returns the folder for this process's share, or why there is no room for it."""
        folder: Path | None = None
        with self._writing:
            pass
        try:
            require_room(self._bytes)
            folder = make_scratch("checkpoint")
            if not self._in_background:
                self._fill(folder, write)
        except Exception as error:
            if not is_full(error):
                raise
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return None, no_room(self._bytes)
        return folder, None

    def _fill(self, folder: Path, write: Callable[[Path], None]) -> None:
        with self._writing:
            write(folder)
            self._bytes = sum(file.stat().st_size for file in folder.rglob("*"))

    def _upload(self, write: Callable[[Path], None], folder: Path) -> Callable[[Any, str], Any]:
        """Returns what a thread of Ray Train does: it writes, and uploads as Ray Train does."""
        import ray.train

        storage: Any = ray.train.get_context().get_storage()

        def write_and_upload(checkpoint: Any, name: str) -> Any:
            self._fill(folder, write)
            return storage.persist_current_checkpoint(checkpoint, name)

        return write_and_upload

    def _remove_left_over(self, name: str) -> None:
        """Removes what a group that was lost while it uploaded this checkpoint has left there.

        Another number of workers writes files of other names, so the two would be mixed.
        """
        fs, path = open_uri(join_uri(self._run_uri, name))
        if fs.exists(path):
            fs.rm(path, recursive=True)
