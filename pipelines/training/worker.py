"""What each Ray Train worker runs: the training loop on its shards, with Ray Train's checkpoints."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.config.train import PretrainConfig
from pipelines.training.contract import DataSource, Say, Worker
from pipelines.training.trainer import Outcome, train

if TYPE_CHECKING:
    from ray.util.queue import Queue


def train_worker(cfg: PretrainConfig, progress: Queue | None = None) -> Outcome:
    """Trains on the shards of a run, with Ray Train's checkpoints: what each worker process calls.

    Args:
        cfg: The run, paths absolute.
        progress: Takes rank 0's lines to the driver; None prints them here.
    """
    import ray.train
    import ray.train.torch

    from pipelines.dataset.shards import read_manifest
    from pipelines.loading.loader import train_batches
    from pipelines.loading.plan import make_plan

    _quiet()
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_world_size=context.get_local_world_size(),
        device=ray.train.torch.get_device() if cfg.run.gpu else torch.device("cpu"),
    )
    manifest = read_manifest(cfg.data.train)
    plan = make_plan(manifest.row_groups(), cfg.data, cfg.run.seed)
    data = DataSource(train_batches, plan.batches_per_epoch, manifest.manifest_hash)
    say = print if progress is None else _say_into(progress)
    return train(cfg, worker, data, RayCheckpoints(), say)


def _say_into(progress: Queue) -> Say:
    """Lines into the driver's queue; without the queue here, for progress must not end a run."""
    from ray.exceptions import RayActorError

    def say(line: str) -> None:
        try:
            progress.put(line)
        except RayActorError:
            print(line)

    return say


def _quiet() -> None:
    """Silences Ray's line about every checkpoint; its logger escapes Ray Train's LoggingConfig."""
    module = sys.modules.get("ray.train.v2._internal.execution.context")
    if module is not None and module.__file__:
        logging.getLogger(module.__file__).setLevel(logging.WARNING)


class RayCheckpoints:
    """Checkpoints through `ray.train.report`: uploaded in the background, then committed."""

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The newest committed checkpoint: after a lost worker, and of an earlier run of the name."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
        else:
            with checkpoint.as_directory() as folder:
                yield Path(folder)

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        """Writes to local disk now; training goes on while Ray uploads."""
        import ray.train

        folder = Path(tempfile.mkdtemp(prefix="rayjepa-checkpoint-"))
        write(folder)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint_{metrics['step']:08d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
