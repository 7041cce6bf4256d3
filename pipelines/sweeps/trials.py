"""The runs of a sweep as trials of Ray Tune: start them, stop the worse ones early, take down each.

A trial is a process that drives a whole `pretrain`, whose checkpoints' RankMe and LiDAR it passes on;
with the process ends all it started. Ray Tune keeps no scheduler's memory over a restart
(`Tuner.restore` starts rungs anew), so what ended runs reported is told to the scheduler again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.config.sweep import SweepConfig
from pipelines.config.train import PretrainConfig
from pipelines.runtime.uris import join_uri, local_copy, ray_storage

METRIC = {"rankme": "fixed_rankme", "lidar": "lidar"}
"""`--metric` to the name in a run's metrics."""
TRIAL_CPUS = 0.01
"""A trial's own process only waits for its workers, which reserve what they need themselves."""
PROBE_ROWS = 10_000

Reading = dict[str, Any]
Train = Callable[[PretrainConfig], Reading]
Score = Callable[[PretrainConfig], Reading]


def train_trial(cfg: PretrainConfig) -> Reading:
    """Trains one run inside a trial; its readings go to Ray Tune at every checkpoint.

    Returns:
        `outcome` (finished, collapsed, failed), `reason`, and the newest readings.
    """
    # Here and below, because the trial's process should not wait for torch before it is needed.
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipelines.runs.checkpoints import CheckpointError
    from pipelines.training.launch import CollapseError, pretrain

    try:
        report = TuneReportCallback()  # type: ignore[no-untyped-call]
        result = pretrain(cfg, callbacks=[report], stream=io.StringIO())
    except CollapseError as error:
        return {"outcome": "collapsed", "reason": str(error)}
    except (CheckpointError, ValueError) as error:
        return {"outcome": "failed", "reason": str(error)}
    return {"outcome": "finished", "reason": None, **_ranks(result.metrics)}


def _ranks(metrics: Mapping[str, float]) -> Reading:
    return {name: metrics[name] for name in METRIC.values() if name in metrics}


def readings(cfg: PretrainConfig) -> list[Reading]:
    """What a run has reported so far, from its metrics.jsonl."""
    from pipelines.runs.run_folder import METRICS, read_metrics

    with local_copy(join_uri(cfg.run.storage, cfg.run.name), METRICS) as folder:
        rows = read_metrics(folder / METRICS)
    # metrics.jsonl has null for what was not finite.
    read = (r for r in rows if all(r.get(name) is not None for name in METRIC.values()))
    return [{"step": r["step"], **_ranks(r)} for r in read]


def _run_trial(config: Mapping[str, int], plan: Sequence[PretrainConfig], train: Train) -> None:
    cfg = plan[config["trial"]]
    # Ray Tune wants the scheduler's metric in every report; a run that ended badly has none.
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
        ended: Trials that have, in the order in which they did.
        record: Told of a trial's end: its number, and `outcome`, `reason`, `seconds`.
        say: Takes lines for a person.
        train: What a trial does.
    """
    missing = [t for t in range(len(plan)) if t not in ended]
    if not missing:
        return
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
        if result.error is not None:  # lost, or raised what `train_trial` does not expect
            lines = str(result.error).strip().splitlines() or [type(result.error).__name__]
            seconds = round((result.metrics or {}).get("time_total_s", 0.0), 1)
            trial = (result.config or {})["trial"]
            record(trial, {"outcome": "failed", "reason": lines[-1], "seconds": seconds})


def _name(trial: Any) -> str:
    return f"trial_{trial.config['trial']:03d}"


def scheduler(
    cfg: SweepConfig, plan: Sequence[PretrainConfig], ended: Sequence[int] = ()
) -> TrialScheduler:
    """ASHA (Li et al. 2020, arXiv 1810.05934) on `cfg.metric`, rungs at checkpoints; or none.

    Args:
        cfg: The sweep.
        plan: The run of each trial.
        ended: Trials whose readings it remembers.
    """
    if cfg.metric == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    steps, first = plan[0].run.steps, plan[0].run.checkpoint_every
    asha = ASHAScheduler(
        time_attr="step",
        metric=METRIC[cfg.metric],
        mode="max",
        # A run at its last step has nothing left to stop, and its last checkpoint to save.
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
    """Says what trials report, and records how each ends."""

    def __init__(self, record: Callable[[int, Reading], None], say: Callable[[str], None]) -> None:
        self._record, self._say = record, say

    def __getstate__(self) -> Reading:
        # Ray Tune pickles its callbacks for its own way of restoring, which is not ours.
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Reading, **info: Any
    ) -> None:
        """A reading, not the report that ends a trial."""
        number = trial.config["trial"]
        if "outcome" not in result:
            ranks = f"RankMe {result['fixed_rankme']:.1f} LiDAR {result['lidar']:.1f}"
            self._say(f"trial {number} step {result['step']} {ranks}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It came to its end, or the scheduler stopped it."""
        last = trial.last_result
        step = last.get("step", 0)
        how = {"outcome": "stopped", "reason": f"by its rank among the runs at step {step}"}
        how |= {k: last[k] for k in ("outcome", "reason") if k in last}
        reason = f": {how['reason']}" if how["reason"] else ""
        self._say(f"trial {trial.config['trial']} {how['outcome']}{reason}")
        seconds = round(last.get("time_total_s", 0.0), 1)
        self._record(trial.config["trial"], {**how, "seconds": seconds})


def score_run(cfg: PretrainConfig) -> Reading:
    """RankMe, LiDAR and, with labels, kNN and linear probe of a run's newest checkpoint, in a task
    that has a worker's CPUs (or GPU); nothing of a run that has none.

    Returns:
        Of `step`, `rankme`, `lidar`, `knn`, `linear`, accuracies as fractions, those there are.
    """
    cpus, gpus = cfg.run.cpus_per_worker, 1 if cfg.run.gpu else 0
    task = ray.remote(num_cpus=cpus, num_gpus=gpus)(_score)
    found: Reading = ray.get(task.remote(cfg))
    return found


def _score(cfg: PretrainConfig) -> Reading:
    import torch

    from pipelines.runs.checkpoints import committed_checkpoints, load_encoder
    from pipelines.training.rank_probe import RankProbe

    checkpoints = committed_checkpoints(join_uri(cfg.run.storage, cfg.run.name))
    if not checkpoints:
        return {}
    torch.set_num_threads(cfg.run.threads or torch.get_num_threads())
    encoder, _, info = load_encoder(checkpoints[-1][0])
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
