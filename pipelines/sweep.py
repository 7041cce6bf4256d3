"""Choose hyperparameters without labels: many short runs of a recipe, ranked by RankMe.

    python -m pipelines.sweep lejepa_cifar10_demo --data.train SHARDS --samples 12 \\
        --space optim.lr=log:3e-4:3e-2 objective.sigreg_weight=0.005,0.02,0.08

Every run is a `pretrain` under OUT/runs, started by Ray Tune. Runs whose RankMe (or LiDAR) on fixed
training samples is low are stopped early. If --data.test names labelled shards, the sweep reports
how well RankMe ranked the runs; labels never decide which run is chosen. Writes OUT/results.jsonl
and OUT/sweep.png. Running the same command again continues with the runs that are missing.
docs/sweep.md explains what the numbers can and cannot tell.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any

if __name__ == "__main__" and not __package__:  # `python pipelines/sweep.py`, uninstalled
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import tyro
from ray.exceptions import RayError
from rich.console import Console

from pipelines.config.jobs import SweepConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import PretrainConfig
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import CheckpointError, decides_the_run, flatten
from pipelines.runtime.cluster import check_fits, cpus_needed, start_ray
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import absolute, prepare
from pipelines.runtime.uris import join_uri, open_uri, write_atomic
from pipelines.sweeps.results import Row, plot, table, verdict
from pipelines.sweeps.space import Settings, apply, draw, parse_space
from pipelines.sweeps.trials import Reading, Score, Train, run_trials, score_run, train_trial
from pipelines.training.launch import check_early

SWEEP, RESULTS, PLOT = "sweep.json", "results.jsonl", "sweep.png"


def sweep(
    cfg: SweepConfig,
    base: PretrainConfig,
    *,
    train: Train = train_trial,
    score: Score = score_run,
    console: Console | None = None,
) -> list[Row]:
    """Runs the missing runs of a sweep, scores every run, and writes and prints the results.

    Args:
        cfg: The sweep.
        base: The recipe; every run is a copy of it with some fields replaced.
        train: Trains the run of one trial.
        score: Computes the metrics of a run's newest checkpoint.
        console: Where the lines and the table are printed; None means stdout.

    Returns:
        One row per run, in the order in which their settings were drawn.

    Raises:
        ValueError: A flag is invalid, or the folder holds another sweep.
        CheckpointError: A run of the sweep exists and cannot be continued.
    """
    console = console or Console()
    cfg = prepare(cfg)
    drawn, plan = make_plan(cfg, base)
    prepare(plan[0], write=False)
    results = ResultsFile(cfg, plan, drawn)
    ready = [check_early(run, join_uri(run.run.storage, run.run.name)) for run in plan]
    _check_labels(plan[0])
    results.begin()
    start_ray(cfg.concurrent * cpus_needed(plan[0]) + 1, training=True)
    check_fits(plan[0], runs=cfg.concurrent)
    for note in ready[0].notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(plan)} runs under {cfg.out}, {len(results.ended)} of them there already")
    run_trials(cfg, plan, results.ended, results.record, console.print, train)
    _score_missing(results, plan, score, console)
    rows = results.rows
    _write(cfg.out, PLOT, plot(rows))
    console.print(table(rows))
    for line in verdict(rows):
        console.print(line, highlight=False)
    console.print(f"results: {join_uri(cfg.out, RESULTS)}, plot: {join_uri(cfg.out, PLOT)}")
    return rows


def _score_missing(
    results: ResultsFile, plan: list[PretrainConfig], score: Score, console: Console
) -> None:
    for trial in results.unscored:
        try:
            found = score(plan[trial])
        except (CheckpointError, RayError) as error:
            # It stays unscored, so the next call of the sweep tries it again.
            console.print(f"WARNING: trial {trial}: its checkpoint was not read: {_short(error)}")
        else:
            results.score(trial, found)


def _short(error: Exception) -> str:
    """One line: the first of a checkpoint error, or the last of a Ray task's traceback."""
    cause = getattr(error, "cause", error)  # Ray raises the traceback and the error as one
    lines = str(cause).strip().splitlines()
    return lines[0] if isinstance(cause, CheckpointError) else lines[-1]


def make_plan(
    cfg: SweepConfig, base: PretrainConfig
) -> tuple[list[Settings], list[PretrainConfig]]:
    """Draws the settings of every run and builds the configurations they make.

    Returns:
        For each run the settings it varies, and its whole configuration.

    Raises:
        ValueError: A flag is invalid; the message names it.
    """
    if not base.data.train:
        raise ValueError("--data.train: name the folder or s3:// prefix of ingested shards")
    if base.run.stop_after is not None:
        raise ValueError("--run.stop-after: a sweep stops runs itself; set --run.steps")
    if base.run.storage != RunConfig().storage:
        raise ValueError("--run.storage: a sweep's runs are in the folder named by --out")
    if base.run.name not in {recipe.run.name for _, recipe in RECIPES.values()}:
        raise ValueError("--run.name: a sweep names its runs itself")
    base = absolute(base)
    drawn = draw(parse_space(cfg.space, base), cfg.samples, cfg.seed)
    return drawn, [_run(cfg, apply(base, settings), i) for i, settings in enumerate(drawn)]


def _run(cfg: SweepConfig, run: PretrainConfig, trial: int) -> PretrainConfig:
    own = dataclasses.replace(
        run.run,
        name=f"trial_{trial:03d}",
        storage=join_uri(cfg.out, "runs"),
        rank_every=run.run.checkpoint_every,  # metrics are reported with checkpoints
        threads=run.run.threads or _threads(cfg, run),
    )
    return dataclasses.replace(run, run=own)


def _threads(cfg: SweepConfig, run: PretrainConfig) -> int | None:
    """Threads of a worker: the CPUs it reserves if runs share the cores, else None (all cores)."""
    shared = cfg.concurrent > 1 and not run.run.gpu
    return max(1, round(run.run.cpus_per_worker)) if shared else None


def _check_labels(run: PretrainConfig) -> None:
    from pipelines.dataset.rows import check_classes
    from pipelines.dataset.shards import read_manifest

    if run.data.test:
        sets = {"--data.train": run.data.train, "--data.test": run.data.test}
        check_classes({flag: read_manifest(uri) for flag, uri in sets.items()})


class ResultsFile:
    """The rows of results.jsonl, rewritten at every change; sweep.json identifies the sweep.

    Args:
        cfg: The sweep.
        plan: The run of each trial.
        drawn: The settings that vary, of each trial.

    Raises:
        ValueError: The folder holds another sweep.
    """

    def __init__(self, cfg: SweepConfig, plan: list[PretrainConfig], drawn: list[Settings]) -> None:
        self._out, self._plan, self._drawn = cfg.out, plan, drawn
        self._sweep = self._identity()
        self._refuse_another()
        rows = [Row(**json.loads(line)) for line in _read(cfg.out, RESULTS).splitlines()]
        # Failed runs are tried again. A collapsed run would only collapse again.
        self._rows = {row.trial: row for row in rows if row.outcome != "failed"}

    def begin(self) -> None:
        """Claims the folder for this sweep by writing sweep.json."""
        _write(self._out, SWEEP, json.dumps(self._sweep, indent=2).encode())

    def _identity(self) -> dict[str, Any]:
        base = flatten(dataclasses.asdict(self._plan[0]))
        varied = self._drawn[0].keys()
        mine = {
            k: v for k, v in base.items() if decides_the_run(k, self._plan[0]) and k not in varied
        }
        mine |= {"data.train": base["data.train"], "runs": self._drawn}
        found: dict[str, Any] = json.loads(json.dumps(mine))
        return found

    def _refuse_another(self) -> None:
        before, mine = json.loads(_read(self._out, SWEEP) or "null"), self._sweep
        if before is None:
            return
        # Settings that the sweep's version did not have were what their defaults are now.
        defaults = json.loads(json.dumps(flatten(dataclasses.asdict(PretrainConfig()))))
        before = {k: defaults[k] for k in mine if k in defaults} | before
        if before != mine:
            keys = [k for k in {**before, **mine} if before.get(k) != mine.get(k)]
            names = ["--space, --samples or --seed" if k == "runs" else f"--{k}" for k in keys]
            raise ValueError(
                f"--out: {self._out} holds another sweep, with other {', '.join(sorted(names))}; "
                "name another folder"
            )

    @property
    def ended(self) -> list[int]:
        """Trials that have ended, in the order in which they ended."""
        return list(self._rows)

    @property
    def unscored(self) -> list[int]:
        """Ended trials whose checkpoint has not been scored, or not yet against labels."""
        labels = bool(self._plan[0].data.test)
        return [
            row.trial
            for row in self._rows.values()
            if not row.scored or (labels and row.rankme is not None and row.knn is None)
        ]

    @property
    def rows(self) -> list[Row]:
        """The rows in the order in which their settings were drawn."""
        return [self._rows[trial] for trial in sorted(self._rows)]

    def record(self, trial: int, how: Reading) -> None:
        """Adds the row of a trial that has ended."""
        run = self._plan[trial].run
        place = join_uri(run.storage, run.name)
        self._rows[trial] = Row(trial=trial, settings=self._drawn[trial], run=place, **how)
        self._save()

    def score(self, trial: int, found: Reading) -> None:
        """Adds the metrics of a trial's newest checkpoint to its row."""
        self._rows[trial] = dataclasses.replace(self._rows[trial], scored=True, **found)
        self._save()

    def _save(self) -> None:
        lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in self._rows.values()]
        _write(self._out, RESULTS, "".join(lines).encode())


def _read(out: str, name: str) -> str:
    fs, path = open_uri(out)
    file = f"{path}/{name}"
    return str(fs.cat_file(file).decode()) if fs.exists(file) else ""


def _write(out: str, name: str, data: bytes) -> None:
    fs, path = open_uri(out)
    write_atomic(fs, f"{path}/{name}", data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    """The command's flags: the sweep's without a prefix, the recipe's prefixed by their section."""

    sweep: Annotated[SweepConfig, tyro.conf.arg(name="")]
    recipe: Annotated[PretrainConfig, tyro.conf.arg(name="")]


def main() -> None:
    """Parses a recipe, the sweep's flags and the overrides, and runs the sweep."""
    commands = {
        name: (line, _Command(sweep=SweepConfig(), recipe=recipe))
        for name, (line, recipe) in RECIPES.items()
    }
    run_command(
        lambda: tyro.extras.overridable_config_cli(commands, description=__doc__),
        lambda command: sweep(command.sweep, command.recipe),
        configs=lambda command: (command.recipe, command.sweep),
    )


if __name__ == "__main__":
    main()
