"""Runs a sweep as trials of Ray Tune: starts them, stops the worse ones early, records each end.

A trial is a process that runs a whole `pretrain` and reports the RankMe and LiDAR of its
checkpoints to Ray Tune. When the process ends, so does everything it started. Ray Tune does not
keep a scheduler's state over a restart (`Tuner.restore` starts with empty rungs), so the reports of
runs that have ended are replayed to a new scheduler.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.config.jobs import SweepConfig
from pipelines.config.train import PretrainConfig
from pipelines.runtime.errors import explain
from pipelines.runtime.uris import join_uri, local_copy, ray_storage

METRIC = {"rankme": "fixed_rankme", "lidar": "lidar"}
"""Names in a run's metrics, by `--metric`."""
TRIAL_CPUS = 0.01
"""A trial's own process only waits for its workers, which reserve their own CPUs."""
PROBE_ROWS = 10_000

Reading = dict[str, Any]
Train = Callable[[PretrainConfig], Reading]
Score = Callable[[PretrainConfig], Reading]


def train_trial(cfg: PretrainConfig) -> Reading:
    """Trains one run inside a trial and reports to Ray Tune at every checkpoint.

    Returns:
        `outcome` (`finished`, `collapsed` or `failed`), `reason`, and the newest RankMe and LiDAR.
    """
    # Imported here and below, so that the trial's process does not load torch before it needs it.
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipelines.training.launch import CollapseError, pretrain

    try:
        report = TuneReportCallback()  # type: ignore[no-untyped-call]
        result = pretrain(cfg, callbacks=[report], stream=io.StringIO())
    except CollapseError as error:
        return {"outcome": "collapsed", "reason": str(error)}
    except Exception as error:
        return {"outcome": "failed", "reason": _reason(error)}
    return {"outcome": "finished", "reason": None, **_ranks(result.metrics)}


def _reason(error: BaseException) -> str:
    """Returns what a command would say of an error.

    Raises:
        BaseException: The error itself, if it is a fault of ours.
    """
    told = explain(error, [])
    if told is None:
        raise error
    return " ".join(told.splitlines())


def _ranks(metrics: Mapping[str, float]) -> Reading:
    return {name: metrics[name] for name in METRIC.values() if name in metrics}


def readings(cfg: PretrainConfig) -> list[Reading]:
    """Reads from metrics.jsonl the steps, RankMe and LiDAR that a run has reported so far."""
    from pipelines.runs.run_folder import METRICS, read_metrics

    with local_copy(join_uri(cfg.run.storage, cfg.run.name), METRICS) as folder:
        rows = read_metrics(folder / METRICS)
    # metrics.jsonl has null for values that were not finite.
    read = (r for r in rows if all(r.get(name) is not None for name in METRIC.values()))
    return [{"step": r["step"], **_ranks(r)} for r in read]


def _run_trial(config: Mapping[str, int], plan: Sequence[PretrainConfig], train: Train) -> None:
    cfg = plan[config["trial"]]
    # Ray Tune needs the scheduler's metric in every report, but a run that ended badly has none.
    worst = dict.fromkeys(METRIC.values(), 0.0)
    tune.report({"step": cfg.run.steps, **worst, **train(cfg)})


def run_trials(
    cfg: SweepConfig,
    plan: Sequence[PretrainConfig],
    ended: Sequence[int],
    record: Callable[[int, Reading], None],
    say: Callable[[str], None],
    train: Train = train_trial,
) -> None:
    """Runs every trial that has not ended.

    Args:
        cfg: The sweep.
        plan: The run of each trial.
        ended: Trials that have ended, in the order in which they ended.
        record: Called when a trial ends, with its number and `outcome`, `reason` and `seconds`.
        say: Takes lines for the user.
        train: Trains the run of one trial.
    """
    missing = [t for t in range(len(plan)) if t not in ended]
    if not missing:
        return
    # Ray Tune's newer output prints a box and two hints even where it is told to be silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    trainable = tune.with_parameters(_run_trial, plan=list(plan), train=train)
    path, filesystem = ray_storage(cfg.out)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
        param_space={"trial": tune.grid_search(missing)},
        tune_config=tune.TuneConfig(
            scheduler=scheduler(cfg, plan, ended),
            max_concurrent_trials=cfg.concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_Watcher(record, say)],
        ),
    )
    grid = tuner.fit()
    for result in (grid[i] for i in range(len(grid))):
        if result.error is not None:  # the process died, or raised an unexpected error
            lines = str(result.error).strip().splitlines() or [type(result.error).__name__]
            reason = " ".join((explain(result.error, []) or lines[-1]).splitlines())
            seconds = round((result.metrics or {}).get("time_total_s", 0.0), 1)
            trial = (result.config or {})["trial"]
            say(f"trial {trial} failed: {reason}")
            record(trial, {"outcome": "failed", "reason": reason, "seconds": seconds})


def _name(trial: Any) -> str:
    return f"trial_{trial.config['trial']:03d}"


def scheduler(
    cfg: SweepConfig, plan: Sequence[PretrainConfig], ended: Sequence[int] = ()
) -> TrialScheduler:
    """Builds the scheduler that stops the worse trials early.

    It is ASHA (Li et al. 2020, arXiv 1810.05934) on `cfg.metric` with rungs at checkpoints, or one
    that stops nothing if the metric is `none`.

    Args:
        cfg: The sweep.
        plan: The run of each trial.
        ended: Trials that have ended, whose reports are replayed to the scheduler.
    """
    if cfg.metric == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    steps, first = plan[0].run.steps, plan[0].run.checkpoint_every
    asha = ASHAScheduler(
        time_attr="step",
        metric=METRIC[cfg.metric],
        mode="max",
        # Do not stop a run at its last step, where it only has to save its last checkpoint.
        max_t=max(steps - 1, first),
        stop_last_trials=False,
        grace_period=first,
        reduction_factor=cfg.reduction,
    )
    for trial in ended:
        stand_in: Any = SimpleNamespace(trial_id=f"ended_{trial}")
        controller: Any = None
        asha.on_trial_add(controller, stand_in)
        for reading in readings(plan[trial]):
            asha.on_trial_result(controller, stand_in, reading)
    return asha


class _Watcher(tune.Callback):
    """A callback of Ray Tune that prints what trials report and records how each one ends."""

    def __init__(self, record: Callable[[int, Reading], None], say: Callable[[str], None]) -> None:
        self._record, self._say = record, say

    def __getstate__(self) -> Reading:
        # Ray Tune pickles callbacks for `Tuner.restore`, which sweeps do not use.
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Reading, **info: Any
    ) -> None:
        """Prints a trial's RankMe and LiDAR, unless this is the report that ends the trial."""
        number = trial.config["trial"]
        if "outcome" not in result:
            ranks = f"RankMe {result['fixed_rankme']:.1f} LiDAR {result['lidar']:.1f}"
            self._say(f"trial {number} step {result['step']} {ranks}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records a trial that ended by itself or was stopped by the scheduler."""
        last = trial.last_result
        step = last.get("step", 0)
        how = {"outcome": "stopped", "reason": f"by its rank among the runs at step {step}"}
        how |= {k: last[k] for k in ("outcome", "reason") if k in last}
        reason = f": {how['reason']}" if how["reason"] else ""
        self._say(f"trial {trial.config['trial']} {how['outcome']}{reason}")
        seconds = round(last.get("time_total_s", 0.0), 1)
        self._record(trial.config["trial"], {**how, "seconds": seconds})


def score_run(cfg: PretrainConfig) -> Reading:
    """Scores a run's newest checkpoint in a Ray task with the resources of a worker.

    Returns:
        `step`, `rankme` and `lidar` and, if there are labels, `knn` and `linear` (accuracies as
        fractions). Empty if the run has no checkpoint.
    """
    cpus, gpus = cfg.run.cpus_per_worker, 1 if cfg.run.gpu else 0
    task = ray.remote(num_cpus=cpus, num_gpus=gpus)(_score)
    found: Reading = ray.get(task.remote(cfg))
    return found


def _score(cfg: PretrainConfig) -> Reading:
    import torch

    from pipelines.runs.checkpoints import committed_checkpoints, load_encoder
    from pipelines.training.probes.rank_probe import RankProbe

    checkpoints = committed_checkpoints(join_uri(cfg.run.storage, cfg.run.name))
    if not checkpoints:
        return {}
    torch.set_num_threads(cfg.run.threads or torch.get_num_threads())
    encoder, saved, info = load_encoder(checkpoints[-1][0])
    cfg = dataclasses.replace(cfg, model=saved.model)  # which names the fit
    encoder.to("cuda" if cfg.run.gpu else "cpu")
    ranks = RankProbe(cfg)(encoder)
    found = {"step": info["step"], "rankme": ranks["fixed_rankme"], "lidar": ranks["lidar"]}
    found = {k: v if math.isfinite(v) else None for k, v in found.items()}
    return found | (_probe(cfg, encoder) if cfg.data.test else {})


def _probe(cfg: PretrainConfig, encoder: Any) -> Reading:
    from pipelines.dataset.rows import load_labelled, table_labels
    from pipelines.evaluation.features import extract_features, preprocessing_of
    from pipelines.evaluation.probes.knn import knn_accuracy
    from pipelines.evaluation.probes.linear import linear_probe
    from pipelines.loading.clips import training_sampler

    prep = preprocessing_of(cfg.model)
    sets: list[Any] = []
    for uri in (cfg.data.train, cfg.data.test):
        table = load_labelled(uri, PROBE_ROWS)
        features = extract_features(encoder, prep, table, sampler=training_sampler(cfg))
        sets += [features, table_labels(table)]
    return {"knn": knn_accuracy(*sets), "linear": linear_probe(*sets, seed=0).accuracy}
