"""Sweeps: search space, drawing, verdict, and trials on Ray Tune with a stand-in for training."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from ray.exceptions import WorkerCrashedError
from ray.train import ControllerError
from rich.console import Console

from helpers.pipelines.fake_training import change
from pipelines.config.jobs import SweepConfig
from pipelines.recipes.images import debug, lejepa_cifar10_demo
from pipelines.runs.checkpoints import CheckpointError
from pipelines.sweep import make_plan, sweep
from pipelines.sweeps.results import Row, best, plot, table, verdict
from pipelines.sweeps.space import apply, draw, parse_space
from pipelines.sweeps.trials import scheduler, train_trial

BASE = lejepa_cifar10_demo()


def test_values_get_the_type_of_their_field():
    axes = parse_space(
        (
            "optim.lr=log:1e-4:1e-2",
            "objective.sigreg-weight=0.005,0.02",
            "optim.betas=(0.9,0.95),(0.9,0.999)",
            "data.flip=true,false",
            "optim.clip_norm=none,1",
            "optim.name=adamw,muon",
            "objective.slices=uniform:64:66",
        ),
        BASE,
    )
    assert [axis.values for axis in axes] == [
        (1e-4, 1e-2),
        (0.005, 0.02),
        ((0.9, 0.95), (0.9, 0.999)),
        (True, False),
        (None, 1.0),
        ("adamw", "muon"),
        (64, 66),
    ]
    assert {axes[-1].at(share) for share in np.linspace(0, 0.999, 50)} == {64, 65, 66}
    cfg = apply(BASE, {"optim.betas": axes[2].values[1], "objective.sigreg_weight": 0.005})
    assert (cfg.optim.betas, cfg.objective.sigreg_weight) == ((0.9, 0.999), 0.005)
    assert cfg.run == BASE.run


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("optim.lr", "name=values"),
        ("optim.rate=1", "no 'optim.rate'"),
        ("lr=1", "no 'lr'"),
        ("optim.lr=fast", "not of type float"),
        ("optim.lr=log:1e-2:1e-4", "LOW < HIGH"),
        ("optim.lr=log:0:1", "LOW > 0"),
        ("optim.lr=uniform:1", "LOW < HIGH"),
        ("optim.lr=-1", "--optim.lr: must be >= 0"),
        ("optim.name=sgd", "none of adamw"),
        ("optim.betas=(0.9,0.95,0.99)", "3 values, not 2"),
        ("optim.betas=uniform:0:1", "one number"),
        ("data.flip=yes", "true or false"),
        ("objective.sigreg_weight=uniform:0.5:2", "must lie in"),
        ("model.encoder=vit_s", "not comparable"),
        ("run.steps=100,200", "not comparable"),
        ("data.train=a,b", "same data"),
        ("clip.stride=1,2", "not comparable"),  # frames that RankMe would be measured on
    ],
)
def test_the_error_names_the_entry_that_cannot_vary(entry, message):
    with pytest.raises(ValueError, match=rf"--space .*{message}"):
        parse_space((entry,), BASE)


def test_the_draw_is_all_combinations_or_a_fixed_random_choice_of_different_ones():
    lists = parse_space(("optim.lr=1e-3,1e-2", "objective.sigreg_weight=0,0.1,0.2"), BASE)
    grid = draw(lists, None, 0)
    assert len({tuple(s.items()) for s in grid}) == len(grid) == 6
    some = draw(lists, 5, 0)
    assert len({tuple(s.items()) for s in some}) == 5
    assert some == draw(lists, 5, 0) != draw(lists, 5, 1)
    with pytest.raises(ValueError, match="only 6 combinations"):
        draw(lists, 7, 0)
    ranges = parse_space(("optim.lr=log:1e-4:1e-2",), BASE)
    with pytest.raises(ValueError, match=r"--samples: say how many; optim\.lr is a range"):
        draw(ranges, None, 0)
    rates = [s["optim.lr"] for s in draw(ranges, 300, 0)]
    assert 1e-4 <= min(rates) < max(rates) <= 1e-2
    assert 0.4 < np.mean(np.array(rates) < 1e-3) < 0.6  # half of them in each decade


def test_an_impossible_plan_is_refused_before_anything_starts(tmp_path):
    base = change(debug(), data={"train": "shards"})
    cfg = SweepConfig(space=("optim.lr=1,2",), out=str(tmp_path))
    drawn, plan = make_plan(cfg, base)
    assert [run.optim.lr for run in plan] == [1.0, 2.0] == [s["optim.lr"] for s in drawn]
    assert [run.run.name for run in plan] == ["trial_000", "trial_001"]
    assert {run.run.rank_every for run in plan} == {base.run.checkpoint_every}
    assert plan[0].run.threads == base.run.threads
    wide = change(base, run={"threads": None, "cpus_per_worker": 3.0})
    assert make_plan(cfg, wide)[1][0].run.threads is None
    several = dataclasses.replace(cfg, concurrent=2)
    assert make_plan(several, wide)[1][0].run.threads == 3
    assert Path(plan[0].data.train).is_absolute()
    with pytest.raises(ValueError, match=r"--data\.train"):
        make_plan(cfg, debug())
    with pytest.raises(ValueError, match=r"--run\.stop-after"):
        make_plan(cfg, change(base, run={"stop_after": 3}))
    with pytest.raises(ValueError, match=r"--run\.storage: .* --out"):
        make_plan(cfg, change(base, run={"storage": "elsewhere"}))
    with pytest.raises(ValueError, match=r"--run\.name"):
        make_plan(cfg, change(base, run={"name": "mine"}))
    with pytest.raises(ValueError, match="--space"):
        make_plan(SweepConfig(out=str(tmp_path)), base)
    assert not list(tmp_path.iterdir())


def test_the_command_line_has_the_sweeps_flags_beside_the_recipes(monkeypatch):
    import pipelines.sweep as job

    taken = []
    monkeypatch.setattr(job, "sweep", lambda cfg, base: taken.append((cfg, base)))
    flags = "debug --space optim.lr=1,2 data.flip=true --samples 2 --metric lidar --run.steps 7"
    monkeypatch.setattr("sys.argv", ["sweep", *flags.split()])
    job.main()
    cfg, base = taken[0]
    assert cfg == SweepConfig(space=("optim.lr=1,2", "data.flip=true"), samples=2, metric="lidar")
    assert base == change(debug(), run={"steps": 7})


def _rows(rankme, knn):
    return [
        Row(trial=i, settings={"optim.lr": 10.0**-i}, outcome="finished", rankme=r, lidar=-r, knn=k)
        for i, (r, k) in enumerate(zip(rankme, knn, strict=True))
    ]


def test_the_verdict_has_rank_correlations_and_the_cost_of_the_choice():
    rows = _rows([10.0, 20.0, 30.0, 40.0], [0.20, 0.30, 0.50, 0.40])
    text = "\n".join(verdict(rows))
    # One of six pairs is the wrong way round: tau = (5 - 1) / 6; sum of d^2 = 2: rho = 1 - 12 / 60.
    assert "RankMe against kNN over 4 runs: Spearman +0.80" in text
    assert "Kendall +0.67" in text
    assert "trial 3, has 40.0, the best, trial 2, 50.0: it costs 10.0 points" in text
    assert "picked at random 15.0 on average" in text
    # LiDAR is the opposite here: the negative control.
    assert "LiDAR against kNN over 4 runs: Spearman -0.80" in text
    assert "trial 0, has 20.0, the best, trial 2, 50.0: it costs 30.0 points" in text
    assert "stopped early" not in text


def test_without_labels_the_verdict_says_that_the_choice_cannot_be_judged():
    rows = [dataclasses.replace(row, knn=None) for row in _rows([1.0, 2.0], [0.1, 0.2])]
    text = "\n".join(verdict(rows))
    assert "RankMe chooses trial 1 (RankMe 2.0): optim.lr=0.1" in text
    assert "cannot be said" in text
    assert "Spearman" not in text
    assert best(rows, "knn") is None


def test_runs_without_a_checkpoint_have_rows_but_are_never_chosen():
    rows = _rows([3.0, 2.0, 1.0], [0.3, 0.2, 0.1])
    rows[1] = dataclasses.replace(rows[1], outcome="stopped", step=5)
    lost = Row(trial=3, settings={"optim.lr": 1.0}, outcome="collapsed", reason="nan")
    # If the projector collapses, the encoder stays random, and its RankMe may be the best.
    stale = dataclasses.replace(lost, trial=4, rankme=9.0, lidar=9.0, knn=0.9, scored=True)
    text = "\n".join(verdict([*rows, lost, stale]))
    assert "RankMe chooses trial 0" in text
    assert "over 3 runs: Spearman +1.00" in text
    assert "between steps 0 and 5" in text
    assert "nothing to choose from" in verdict([lost])[0]
    shown = io.StringIO()
    Console(file=shown, width=200).print(table([*rows, lost]))
    assert "collapsed" in shown.getvalue()
    for some in ([*rows, lost], [lost]):
        assert plot(some).startswith(b"\x89PNG")


def test_a_trial_returns_how_its_run_ended_instead_of_raising(monkeypatch):
    import pipelines.training.launch as job

    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", lambda: None)

    def end(error):
        def raised(cfg, **how):
            raise error

        monkeypatch.setattr(job, "pretrain", raised)
        return train_trial(debug())

    assert end(job.CollapseError("rank 1")) == {"outcome": "collapsed", "reason": "rank 1"}
    assert end(ValueError("--data.x"))["outcome"] == "failed"
    lost = end(ControllerError(WorkerCrashedError()))
    assert lost["outcome"] == "failed"  # and so it is tried again
    assert lost["reason"].startswith("a process of the job was lost (WorkerCrashedError: ")
    with pytest.raises(RuntimeError):  # what is not foreseen is Ray Tune's to record
        end(RuntimeError("disk"))


def _readings(cfg, value):
    folder = Path(cfg.run.storage) / cfg.run.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "fixed_rankme": value, "lidar": value} for step in (10, 20, 30)]
    rows.append({"step": 40, "fixed_rankme": None, "lidar": None})  # features that were not finite
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_ended_runs_fill_the_rungs_of_a_new_scheduler(tmp_path):
    base = change(debug(), data={"train": "x"}, run={"steps": 90, "checkpoint_every": 10})
    cfg = SweepConfig(space=("optim.lr=1,2,3,4",), out=str(tmp_path), reduction=3)
    plan = make_plan(cfg, base)[1]
    for run, value in zip(plan[:3], (1.0, 2.0, 3.0), strict=True):
        _readings(run, value)

    def decide(asha, value):
        trial = type("Trial", (), {"trial_id": f"new {value}"})()
        asha.on_trial_add(None, trial)
        return asha.on_trial_result(None, trial, {"step": 10, "fixed_rankme": value})

    # Of 1, 2, 3 the best third is above 2.33.
    assert decide(scheduler(cfg, plan, [0, 1, 2]), 2.0) == "STOP"
    assert decide(scheduler(cfg, plan, [0, 1, 2]), 2.5) == "CONTINUE"
    assert decide(scheduler(cfg, plan), 2.0) == "CONTINUE"  # the control: it knows of none


@pytest.mark.ray
def test_a_sweep_stops_worse_runs_records_failures_and_resumes(ray_local, cifar_shards, tmp_path):
    base = change(
        debug(), data={"train": cifar_shards[0]}, run={"steps": 90, "checkpoint_every": 10}
    )
    cfg = SweepConfig(space=("optim.lr=0.3,0.2",), out=str(tmp_path / "sweep"))
    started = tmp_path / "started"

    def fake(broken):
        # Inside, so that it travels by value: workers do not know this file.
        def train(cfg):
            from ray import tune

            with started.open("a") as file:
                file.write(f"{cfg.run.name}\n")
            if cfg.optim.lr == broken:
                raise RuntimeError("the disk is full")
            folder = os.path.join(cfg.run.storage, cfg.run.name)  # noqa: PTH118
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            for step in (10, 20, 30):
                reading = {"step": step, "fixed_rankme": cfg.optim.lr, "lidar": 1.0}
                with open(f"{folder}/metrics.jsonl", "a") as file:  # noqa: PTH123
                    file.write(json.dumps(reading) + "\n")
                tune.report(reading)
            return {"outcome": "finished", "reason": None}

        return train

    def score(run):
        probes = {"knn": run.optim.lr, "linear": 0.5} if run.data.test else {}
        return {"rankme": 10 * run.optim.lr, "lidar": 1.0, "step": 90, **probes}

    def unreadable(run):
        raise CheckpointError("cut off")

    def go(broken, base=base, score=score):
        said = io.StringIO()
        console = Console(file=said, width=200)
        return sweep(cfg, base, train=fake(broken), score=score, console=console), said.getvalue()

    rows, said = go(broken=0.2, score=unreadable)
    assert [(row.settings["optim.lr"], row.outcome) for row in rows] == [
        (0.3, "finished"),
        (0.2, "failed"),
    ]
    assert rows[1].reason == "RuntimeError: the disk is full"
    assert "trial 0 step 30 RankMe 0.3" in said
    assert "WARNING: trial 0: its checkpoint was not read: cut off" in said
    assert "nothing to choose from" in said
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")

    again, said = go(broken=None)
    names = started.read_text().split()
    assert names == ["trial_000", "trial_001", "trial_001"]  # only what had failed
    assert again[0] == dataclasses.replace(rows[0], scored=True, rankme=3.0, lidar=1.0, step=90)
    assert "RankMe chooses trial 0" in said
    assert "cannot be said" in said
    assert again[1].outcome == "stopped"  # by a rung that the run before had reached
    assert "trial 1 step 10 RankMe 0.2" in said
    assert "trial 1 step 20" not in said
    assert "1 of them there already" in said
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    assert [Row(**json.loads(line)) for line in lines] == again

    # Labels that came later: scored again, not run again.
    labelled, said = go(None, change(base, data={"test": cifar_shards[1]}))
    assert [row.knn for row in labelled] == [0.3, 0.2]
    assert "RankMe against kNN over 2 runs" in said
    assert started.read_text().split() == names

    other = dataclasses.replace(cfg, space=("optim.lr=0.3,0.5",))
    with pytest.raises(ValueError, match=r"--out: .* holds another sweep, with other --space"):
        sweep(other, base)
    with pytest.raises(ValueError, match=r"holds another sweep, with other --optim\.warmup_steps"):
        sweep(cfg, change(base, optim={"warmup_steps": 5}))
    assert not math.isnan(again[0].seconds)


@pytest.mark.slow  # half a minute and more, nearly all of it starting processes
@pytest.mark.ray
def test_a_trial_is_a_real_run_whose_readings_reach_ray_tune(
    ray_local, cifar_shards, tmp_path, capsys
):
    base = change(
        debug(),
        data={"train": cifar_shards[0], "test": cifar_shards[1]},
        run={"steps": 4, "checkpoint_every": 2, "log_every": 2, "threads": 1},
    )
    cfg = SweepConfig(space=("optim.lr=0.001",), out=str(tmp_path / "sweep"))
    said = io.StringIO()
    (row,) = sweep(cfg, base, console=Console(file=said, width=200))
    printed = capsys.readouterr().out
    assert "Configuration for experiment" not in printed  # Ray Tune's own
    assert "View detailed results" not in printed
    assert (row.outcome, row.step) == ("finished", 4)
    readings = [
        json.loads(line)
        for line in (Path(row.run) / "metrics.jsonl").read_text().splitlines()
        if "lidar" in line
    ]
    assert [r["step"] for r in readings] == [2, 4]
    # The table's numbers are of the checkpoint, and equal what the run itself read there.
    assert row.rankme == pytest.approx(readings[-1]["fixed_rankme"], rel=1e-4)
    assert row.lidar == pytest.approx(readings[-1]["lidar"], rel=1e-4)
    assert 0 < row.knn < 1
    assert 0 < row.linear < 1
    for reading in readings:
        shown = f"step {reading['step']} RankMe {reading['fixed_rankme']:.1f}"
        assert shown in said.getvalue()
