"""The runs of a sweep as trials of Ray Tune: start them, stop the worse ones early, take down each.

A trial is a process that drives a whole `pretrain`, whose checkpoints' RankMe and LiDAR it passes on.
Ray Tune keeps no scheduler's memory over a restart, so runs that have ended report their old readings
again, in a moment and before all others, instead of training.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.checkpoints import CheckpointError, committed_checkpoints, load_encoder
from pipelines.config import PretrainConfig, SweepConfig
from pipelines.pretrain import CollapseError, pretrain
from pipelines.storage import join_uri, local_copy, ray_storage
from pipelines.tracking import METRICS, read_metrics

METRIC = {"rankme": "fixed_rankme", "lidar": "lidar"}
"""`--metric` to the name in a run's metrics."""
TRIAL_CPUS = 0.01
"""A trial's own process only waits for its workers, which reserve what they need themselves."""
PROBE_ROWS = 10_000

Reading = dict[str, Any]
Train = Callable[[PretrainConfig], Reading]


def train_trial(cfg: PretrainConfig) -> Reading:
    """Trains one run inside a trial; its readings go to Ray Tune at every checkpoint.

    Returns:
        `outcome` (finished, collapsed, failed), `reason`, and the newest readings.
    """
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
    with local_copy(join_uri(cfg.run.storage, cfg.run.name), METRICS) as folder:
        rows = read_metrics(folder / METRICS)
    return [{"step": r["step"], **_ranks(r)} for r in rows if set(METRIC.values()) <= r.keys()]


def _run_trial(
    config: Mapping[str, int],
    plan: Sequence[PretrainConfig],
    ended: Mapping[int, list[Reading]],
    train: Train,
) -> None:
    trial = config["trial"]
    for reading in ended.get(trial, ()):
        tune.report(reading)
    if trial not in ended:
        # Ray Tune wants the scheduler's metric in every report; a run that ended badly has none.
        worst = dict.fromkeys(METRIC.values(), 0.0)
        tune.report({"step": plan[trial].run.steps, **worst, **train(plan[trial])})


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
    again = {} if cfg.metric == "none" else {t: readings(plan[t]) for t in ended}
    missing = [t for t in range(len(plan)) if t not in ended]
    if not missing:
        return
    trainable = tune.with_parameters(_run_trial, plan=list(plan), ended=again, train=train)
    path, filesystem = ray_storage(cfg.out)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
        param_space={"trial": tune.grid_search([*again, *missing])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler(cfg, plan[0]),
            max_concurrent_trials=cfg.concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_Watcher(set(again), record, say)],
        ),
    )
    tuner.fit()


def _name(trial: Any) -> str:
    return f"trial_{trial.config['trial']:03d}"


def scheduler(cfg: SweepConfig, run: PretrainConfig) -> TrialScheduler:
    """ASHA (Li et al. 2020, arXiv 1810.05934) on `cfg.metric`, rungs at checkpoints; or none."""
    if cfg.metric == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    return ASHAScheduler(
        time_attr="step",
        metric=METRIC[cfg.metric],
        mode="max",
        # A run at its last step has nothing left to stop, and its last checkpoint to save.
        max_t=max(run.run.steps - 1, run.run.checkpoint_every),
        stop_last_trials=False,
        grace_period=run.run.checkpoint_every,
        reduction_factor=cfg.reduction,
    )


class _Watcher(tune.Callback):
    """Says what trials report, and records how each ends."""

    def __init__(
        self,
        again: set[int],
        record: Callable[[int, Reading], None],
        say: Callable[[str], None],
    ) -> None:
        self._again, self._record, self._say = again, record, say

    def __getstate__(self) -> Reading:
        # Ray Tune pickles its callbacks for its own way of restoring, which is not ours.
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Reading, **info: Any
    ) -> None:
        """A reading, not the report that ends a trial."""
        number = trial.config["trial"]
        if number not in self._again and "outcome" not in result:
            ranks = f"RankMe {result['fixed_rankme']:.1f} LiDAR {result['lidar']:.1f}"
            self._say(f"trial {number} step {result['step']} {ranks}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It came to its end, or the scheduler stopped it."""
        last = trial.last_result
        step = last.get("step", 0)
        stopped = {"outcome": "stopped", "reason": f"by its rank among the runs at step {step}"}
        self._end(trial, stopped | {k: last[k] for k in ("outcome", "reason") if k in last})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process was lost, or raised what `train_trial` does not expect."""
        error = trial.get_error()
        cause = getattr(error, "cause", None) or error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        self._end(trial, {"outcome": "failed", "reason": lines[-1]})

    def _end(self, trial: Any, how: Reading) -> None:
        number = trial.config["trial"]
        if number in self._again:
            return
        self._say(
            f"trial {number} {how['outcome']}" + (f": {how['reason']}" if how["reason"] else "")
        )
        self._record(
            number, how | {"seconds": round(trial.last_result.get("time_total_s", 0.0), 1)}
        )


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

    from pipelines.rank_probe import RankProbe

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
    from models.preprocessing import Preprocessing
    from pipelines.clip_sampling import training_sampler
    from pipelines.features import extract_features, load_labelled, table_labels
    from pipelines.probes import knn_accuracy, linear_probe

    prep = Preprocessing(image_size=cfg.model.image_size, mean=cfg.model.mean, std=cfg.model.std)
    sets: list[Any] = []
    for uri in (cfg.data.train, cfg.data.test):
        table = load_labelled(uri, PROBE_ROWS)
        features = extract_features(encoder, prep, table, sampler=training_sampler(cfg))
        sets += [features, table_labels(table)]
    return {"knn": knn_accuracy(*sets), "linear": linear_probe(*sets, seed=0).accuracy}
