"""Runs one pretraining on Ray Train: checks it before Ray starts, trains, returns the result."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from models.media.fit import Fit
from pipelines.config.train import PretrainConfig
from pipelines.dataset.aspects import fit_notes
from pipelines.runs.checkpoint_list import best_checkpoint
from pipelines.runs.checkpoints import (
    CheckpointError,
    CheckpointState,
    check_resumable,
    committed_checkpoints,
    read_config,
    read_state,
)
from pipelines.runs.initial_weights import check_initial
from pipelines.runs.lease import Lease, RunInUseError, held, taken_over
from pipelines.runs.resuming import Start, find_start, go_back
from pipelines.runtime.cluster import check_fits, cpus_needed, start_ray
from pipelines.runtime.lines.watch import Group, cluster_lines
from pipelines.runtime.lines.worker_lines import say_into, worker_lines
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import join_uri, local_copy, ray_storage

if TYPE_CHECKING:
    from pipelines.loading.mixing import TrainingSet
    from pipelines.training.contract import Outcome


class CollapseError(RuntimeError):
    """Raised if the encoder collapsed or the loss diverged while `watch.action` is `stop`."""


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """Where a finished or stopped run is, and its newest metrics."""

    run_uri: str
    best_checkpoint: str
    last_checkpoint: str
    step: int
    metrics: dict[str, float]


def pretrain(
    cfg: PretrainConfig, *, callbacks: Sequence[Any] = (), stream: Any = None
) -> PretrainResult:
    """Trains `cfg` on Ray Train and waits until it ends.

    Uses the Ray this process is connected to, else the one at RAY_ADDRESS, else one that `ray
    start` left on this machine. If there is none, or with RAY_ADDRESS=local, it starts its own.

    Args:
        cfg: The run.
        callbacks: Callbacks of Ray Train, called at every checkpoint.
        stream: Where lines for the user are printed; None means stdout.

    Raises:
        ValueError: No training data is named, or the cluster cannot fit the run.
        CheckpointError: An earlier run of this name exists and cannot be continued.
        CollapseError: The run was stopped because the encoder collapsed or the loss diverged.
        RunInUseError: Another job trains this run, or has taken it over.
    """
    if not cfg.data.train:
        raise ValueError("--data.train: name the folder or s3:// prefix of ingested shards")
    cfg = prepare(cfg)
    run_uri = join_uri(cfg.run.storage, cfg.run.name)
    stream = stream or sys.stdout
    ready = check_early(cfg, run_uri)
    say = functools.partial(print, file=stream, flush=True)
    for note in ready.notes:
        say(note)
    with held(run_uri, take_over=cfg.run.take_over, say=say) as lease:
        if lease.taken_from is not None:  # which has written since
            ready = check_early(cfg, run_uri)
        start_ray(cpus_needed(ready.cfg), training=True)
        check_fits(ready.cfg)
        outcome = _fit_from(ready.start, ready.cfg, lease, callbacks, stream)
    if outcome.taken_over:
        raise RunInUseError(taken_over(run_uri, outcome.taken_over))
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


@dataclasses.dataclass(frozen=True)
class Ready:
    """A run whose configuration is complete."""

    cfg: PretrainConfig
    """The configuration, with what it leaves open filled in."""
    start: Start
    """The checkpoint from which the run continues."""
    saved: tuple[PretrainConfig, CheckpointState] | None
    """What that checkpoint holds; None if the run has none yet."""
    sets: list[TrainingSet]
    """What it trains on."""

    @property
    def notes(self) -> list[str]:
        """Lines for the user before workers start."""
        model = self.cfg.model
        sets = [(one.flag, one.data.train, one.manifest) for one in self.sets]
        told = fit_notes(sets, model.chosen_fit, model.image_size, model.patch_size)
        return [*([self.start.note] if self.start.note else []), *told]


def check_early(cfg: PretrainConfig, run_uri: str) -> Ready:
    """Completes a configuration, and checks data, settings and checkpoints before Ray starts.

    This takes a second; the workers would need twenty to find the same errors.

    Raises:
        ValueError: A setting is invalid; the message names its flag.
        CheckpointError: The run exists with other settings, or its checkpoints are damaged; the
            message names the flags that differ, or the checkpoints that are whole.
    """
    from models.encoders.shape import find_preset
    from models.objectives.registry import find_objective
    from pipelines.loading.masks.maskers import make_masker
    from pipelines.loading.mixing import identity_of
    from pipelines.loading.plan import make_plan
    from pipelines.training.optimizers import check_installed

    ready = complete(cfg, run_uri)
    cfg = ready.cfg
    for one in ready.sets:
        make_plan(one.manifest.row_group_array(), one.data, cfg.run.seed)  # refuses too few rows
    find_preset(cfg.model.encoder)
    find_objective(cfg.objective.name)
    make_masker(cfg).check()
    check_installed(cfg.optim)
    if ready.saved:
        check_resumable(*ready.saved, cfg, identity_of([one.manifest for one in ready.sets]))
    elif cfg.run.init_from:
        start = dataclasses.replace(ready.start, note=check_initial(cfg))
        ready = dataclasses.replace(ready, start=start)
    return ready


def complete(cfg: PretrainConfig, run_uri: str) -> Ready:
    """Finds where a run continues, and fills in what its configuration leaves open.

    A checkpoint of the run has fixed how many shards are read of sets that may grow, and how
    pictures are fitted. A new run reads what there is, and squashes pictures.

    Raises:
        ValueError: A data set is not ingested.
        CheckpointError: The run's checkpoints are damaged.
    """
    from pipelines.loading.mixing import training_sets, with_published
    from pipelines.training.contract import end_step

    now = with_published(cfg)
    first_step = min(cfg.run.checkpoint_every, end_step(cfg))
    start, saved = find_start(run_uri, cfg.run.resume_from, first_step), None
    if start.uri:
        with local_copy(start.uri, "*.json") as folder:
            saved = read_config(folder, start.uri), read_state(folder, start.uri)
    old = saved[0] if saved else None
    if old and now is not cfg:
        data = dataclasses.replace(cfg.data, published=old.data.published)
        now = dataclasses.replace(cfg, data=data)
    now = _with_fit(now, old)
    return Ready(now, start, saved, training_sets(now))


def _with_fit(cfg: PretrainConfig, saved: PretrainConfig | None) -> PretrainConfig:
    """Chooses how pictures are fitted where the configuration leaves it open.

    A new run squashes them, so that nothing of a picture is lost unasked. A run that is resumed
    keeps its own fit; runs made before there was a choice crop.

    Args:
        cfg: The run.
        saved: Its configuration in the checkpoint from which it continues; None if it is new.
    """
    if cfg.model.fit is not None:
        return cfg
    fit: Fit = saved.model.chosen_fit if saved else "squash"
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, fit=fit))


def _fit_from(
    start: Start, cfg: PretrainConfig, lease: Lease, callbacks: Sequence[Any], stream: Any
) -> Outcome:
    """Trains; if the checkpoint turns out to be damaged as it is loaded, from the one before it."""
    from ray.train import ControllerError

    from pipelines.runtime.worker_failures import LOST_IN_START, failures_left
    from pipelines.training.contract import end_step

    first_step = min(cfg.run.checkpoint_every, end_step(cfg))
    say = functools.partial(print, file=stream, flush=True)
    while True:
        go_back(start, ranked=bool(cfg.run.probe_every), say=say)
        try:
            outcome = _fit(cfg, lease, callbacks, stream)
        except ControllerError as error:
            left = failures_left(error, cfg.run.max_failures)
            if left is None:
                raise
            say(LOST_IN_START)
            run = dataclasses.replace(cfg.run, max_failures=left, resume_from=None)
            cfg = dataclasses.replace(cfg, run=run)
            start = find_start(start.run_uri, None, first_step)
            continue
        if not outcome.damaged:
            return outcome
        fault = (outcome.refused or "").partition("\n")[0].removeprefix(f"{outcome.damaged}/")
        damaged = {outcome.damaged.rpartition("/")[2]: fault.rstrip(".")}
        start = find_start(start.run_uri, cfg.run.resume_from, first_step, damaged)


def _fit(cfg: PretrainConfig, lease: Lease, callbacks: Sequence[Any], stream: Any) -> Outcome:
    from pipelines.training.worker import train_worker
    from pipelines.worker_group.backend import NodeTorchConfig
    from pipelines.worker_group.trainer import GroupTrainer, group_watch, scaling_of

    scaling = scaling_of(cfg)
    group = Group(scaling.resources_per_worker, cfg.group_sizes[0])
    with worker_lines(stream) as queue, cluster_lines(say := say_into(queue), group):
        trainer = GroupTrainer(
            functools.partial(train_worker, cfg, queue, lease.token),
            # With GPUs too, gloo is needed for CPU tensors: messages between the processes.
            torch_config=NodeTorchConfig(backend="cpu:gloo,cuda:nccl" if cfg.run.gpu else "gloo"),
            scaling_config=scaling,
            run_config=_run_config(cfg, [group_watch(cfg, say), *callbacks]),
            sizes=cfg.group_sizes,
            say=say,
        )
        # The public import path is typed as Ray Train V1, but is V2 at run time.
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
            # Ray Train always keeps the newest too, from which lost workers resume.
            num_to_keep=cfg.run.keep_checkpoints,
            checkpoint_score_attribute="score" if cfg.run.probe_every else None,
        ),
        logging_config=LoggingConfig(log_level="WARNING"),
        callbacks=list(callbacks),
    )
