"""One pretraining run on Ray Train: checked before Ray starts, fitted, and its outcome."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_list import best_checkpoint
from pipelines.runs.checkpoints import (
    CheckpointError,
    check_resumable,
    committed_checkpoints,
    read_config,
    read_state,
)
from pipelines.runs.initial_weights import check_initial
from pipelines.runs.resuming import Start, find_start, go_back
from pipelines.runtime.cluster import check_fits, cpus_needed, start_ray
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import join_uri, local_copy, ray_storage
from pipelines.runtime.worker_lines import worker_lines

if TYPE_CHECKING:
    from pipelines.training.trainer import Outcome


class CollapseError(RuntimeError):
    """The encoder collapsed or the loss diverged, and `watch.action` is `stop`."""


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """Where a finished (or stopped) run is, and its newest numbers."""

    run_uri: str
    best_checkpoint: str
    last_checkpoint: str
    step: int
    metrics: dict[str, float]


def pretrain(
    cfg: PretrainConfig, *, callbacks: Sequence[Any] = (), stream: Any = None
) -> PretrainResult:
    """Trains `cfg` through Ray Train and waits for the end.

    Uses the Ray that this process has, or RAY_ADDRESS names, or `ray start` left on this machine;
    else (or with RAY_ADDRESS=local) one of its own.

    Args:
        cfg: The run.
        callbacks: Ray Train's, told of every checkpoint.
        stream: Takes lines for a person; None is stdout.

    Raises:
        ValueError: no training data named, or the cluster cannot fit the run.
        CheckpointError: an earlier run of the name exists and cannot be continued.
        CollapseError: the run was stopped because it collapsed.
    """
    if not cfg.data.train:
        raise ValueError("--data.train: name the folder or s3:// prefix of ingested shards")
    cfg = prepare(cfg)
    run_uri = join_uri(cfg.run.storage, cfg.run.name)
    stream = stream or sys.stdout
    start = check_early(cfg, run_uri)
    say = functools.partial(print, file=stream, flush=True)
    if start.note:
        say(start.note)
    start_ray(cpus_needed(cfg), training=True)
    check_fits(cfg)
    go_back(start, ranked=bool(cfg.run.probe_every), say=say)
    outcome = _fit(cfg, callbacks, stream)
    if outcome.refused:
        raise CheckpointError(outcome.refused)
    if outcome.collapsed:
        raise CollapseError(outcome.collapsed)
    return PretrainResult(
        run_uri=run_uri,
        best_checkpoint=best_checkpoint(run_uri) or "",
        last_checkpoint=committed_checkpoints(run_uri)[-1][0],
        step=outcome.step,
        metrics=outcome.metrics,
    )


def check_early(cfg: PretrainConfig, run_uri: str) -> Start:
    """Finds in a second what workers would find in twenty: bad data, a run of other settings, or one
    whose checkpoints are damaged.

    Returns:
        Where the run goes on.

    Raises:
        ValueError: naming the flag.
        CheckpointError: naming the flags that differ from the run's, or what of the run is whole.
    """
    from models.encoders.shape import find_preset
    from models.objectives.registry import find_objective
    from pipelines.dataset.shards import read_manifest
    from pipelines.loading.loader import check_modality
    from pipelines.loading.masks.maskers import make_masker
    from pipelines.loading.plan import make_plan
    from pipelines.training.contract import end_step
    from pipelines.training.optimizers import check_installed

    manifest = read_manifest(cfg.data.train)
    check_modality(cfg, manifest)
    make_plan(manifest.row_groups(), cfg.data, cfg.run.seed)  # refuses too few rows for a batch
    find_preset(cfg.model.encoder)
    find_objective(cfg.objective.name)
    make_masker(cfg).check()
    check_installed(cfg.optim)
    start = find_start(run_uri, cfg.run.resume_from, min(cfg.run.checkpoint_every, end_step(cfg)))
    if start.uri:
        with local_copy(start.uri, "*.json") as folder:
            check_resumable(read_config(folder), read_state(folder), cfg, manifest.manifest_hash)
    elif cfg.run.init_from:
        start = dataclasses.replace(start, note=check_initial(cfg))
    return start


def _fit(cfg: PretrainConfig, callbacks: Sequence[Any], stream: Any) -> Outcome:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.worker import train_worker

    resources = {"CPU": cfg.run.cpus_per_worker} | ({"GPU": 1} if cfg.run.gpu else {})
    with worker_lines(stream) as queue:
        trainer = TorchTrainer(
            functools.partial(train_worker, cfg, queue),  # type: ignore[arg-type]
            # With GPUs too, gloo for what lives on the CPU: messages and the moments of the watch.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cfg.run.gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cfg.run.workers, use_gpu=cfg.run.gpu, resources_per_worker=resources
            ),
            run_config=_run_config(cfg, callbacks),
        )
        # Typed as Ray Train V1 when imported from its public place; it is V2.
        result: Any = trainer.fit()
        outcome: Outcome = result.return_value
    return outcome


def _run_config(cfg: PretrainConfig, callbacks: Sequence[Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig

    path, filesystem = ray_storage(cfg.run.storage)
    return RunConfig(  # type: ignore[call-arg]  # as above
        name=cfg.run.name,
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=cfg.run.max_failures),
        checkpoint_config=CheckpointConfig(
            # The newest is always kept besides, since it is where a lost worker resumes.
            num_to_keep=cfg.run.keep_checkpoints,
            checkpoint_score_attribute="score" if cfg.run.probe_every else None,
        ),
        logging_config=LoggingConfig(log_level="WARNING"),
        callbacks=list(callbacks),
    )
