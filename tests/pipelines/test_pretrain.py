"""The pretraining job on Ray Train: command line, S3, two workers, and a killed worker.

Starting the workers takes most of the time, so there are few runs and many assertions on each.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers.own_ray import python_path
from helpers.pipelines.fake_training import FolderStore, change
from helpers.pipelines.sample_logs import chain, samples, samples_so_far
from helpers.repository import ROOT
from helpers.waiting import wait_until
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_manifest
from pipelines.loading.loader import train_batches
from pipelines.loading.plan import make_plan
from pipelines.pretrain import main
from pipelines.recipes.images import debug
from pipelines.recipes.recipe import REGISTERED
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import CheckpointError, load_encoder, load_tensors
from pipelines.runs.run_folder import read_metrics
from pipelines.runtime.cluster import check_fits
from pipelines.runtime.lines.worker_lines import LinePrinter, say_into, worker_lines
from pipelines.training import launch
from pipelines.training.contract import DataSource, Worker
from pipelines.training.launch import pretrain
from pipelines.training.trainer import train

STEPS = 48  # three epochs of 512 images
EPOCH = 16

pytestmark = pytest.mark.ray


def _config(cifar_shards, storage, **run) -> PretrainConfig:
    run = {"steps": STEPS, "log_every": 1, "checkpoint_every": 5, "threads": 1, **run}
    return change(debug(), data={"train": cifar_shards[0]}, run={"storage": str(storage), **run})


def _losses(path: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(path) if "loss" in row]


def _cli(arguments: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs `python .../pipelines/pretrain.py` with the project neither installed nor on a path."""
    clean = os.environ | {"PYTHONPATH": python_path(), "RAY_ADDRESS": "local"}
    command = [sys.executable, str(ROOT / "pipelines" / "pretrain.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=clean | env, text=True, capture_output=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def one_worker(cifar_shards, s3, tmp_path_factory):
    """One worker with checkpoints on S3, stopped at step 7 and resumed from the command line."""
    folder = tmp_path_factory.mktemp("one_worker")
    every = {"log_every": 1, "checkpoint_every": 12, "probe_every": 24, "keep_checkpoints": 1}
    cfg = _config(cifar_shards, "s3://pretrain/runs", name="one", log_samples=True, **every)
    cfg = change(cfg, data={"test": cifar_shards[1]})
    command = [
        *("debug", "--data.train", cifar_shards[0], "--data.test", cifar_shards[1]),
        *("--run.storage", "s3://pretrain/runs", "--run.name", "one", "--run.steps", str(STEPS)),
        *("--run.log-every", "1", "--run.checkpoint-every", "12", "--run.probe-every", "24"),
        *("--run.threads", "1", "--run.keep-checkpoints", "1", "--run.log-samples"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3.items():
            patch.setenv(key, value)
        import s3fs

        remote = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        remote.mkdir("pretrain")
        assert pretrain(change(cfg, run={"stop_after": 7})).step == 7
        listed_first = {Path(p).name for p in remote.ls("pretrain/runs/one")}
        done = _cli(command, folder, s3)
        assert done.returncode == 0, done.stderr[-3000:]
        remote.get("pretrain/runs/one", str(folder / "one"), recursive=True)
        yield folder / "one", done, listed_first


@pytest.fixture(scope="module")
def two_workers(cifar_shards, tmp_path_factory):
    """Two workers; one of them is killed in the middle of an epoch."""
    storage = tmp_path_factory.mktemp("two_workers")
    cfg = _config(cifar_shards, storage, name="two", workers=2, log_samples=True)
    killed, over = {}, threading.Event()

    def kill_one():
        committed = storage / "two" / "checkpoint_manager_snapshot.json"
        while not killed and not over.wait(0.01):
            rows = [r for r in samples_so_far(storage / "two") if r["rank"] == 1]
            step = rows[-1]["step"] if committed.exists() and rows else 0
            # Well inside an epoch and some steps after a checkpoint, so that steps are lost.
            if 4 <= step % EPOCH <= 10 and step % 5 in (2, 3):
                os.kill(rows[-1]["pid"], signal.SIGKILL)
                killed.update(time=time.time(), pid=rows[-1]["pid"])

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    shown = io.StringIO()
    result = pretrain(cfg, stream=shown)
    over.set()
    return storage / "two", result, killed, shown.getvalue()


def test_command_line_resumes_and_probes_on_s3_from_an_uninstalled_checkout(one_worker):
    folder, done, listed_first = one_worker
    assert "checkpoint_00000007" in listed_first
    assert "resuming run 'one' at step 7" in done.stdout
    assert f"step {STEPS}/{STEPS} loss" in done.stdout
    assert "knn" in done.stdout
    assert "img/s wait" in done.stdout

    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    scores = {row["step"]: row["knn"] for row in rows if "knn" in row}
    assert set(scores) == {0, 24, 48}
    assert all(0 <= score <= 1 for score in scores.values())
    assert list((folder / "tensorboard").glob("events.*"))
    assert json.loads((folder / "config.json").read_text())["run"]["name"] == "one"

    best = max((24, 48), key=lambda step: (scores[step], step))
    assert f"best checkpoint s3://pretrain/runs/one/checkpoint_{best:08d}" in done.stdout
    assert f"last checkpoint s3://pretrain/runs/one/checkpoint_{STEPS:08d}" in done.stdout
    # One is kept for its score, and the newest.
    kept = {path.parent.name for path in folder.glob("checkpoint_*/state.json")}
    assert kept == {f"checkpoint_{step:08d}" for step in {best, STEPS}}


def test_a_run_folder_on_s3_means_its_best_checkpoint(one_worker, s3, monkeypatch):
    folder, *_ = one_worker
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    encoder, config, info = load_encoder("s3://pretrain/runs/one")
    rows = read_metrics(folder / "metrics.jsonl")
    scores = {row["step"]: row["knn"] for row in rows if "knn" in row and row["step"]}
    best = max(scores, key=lambda step: (scores[step], step))
    assert info["uri"] == f"s3://pretrain/runs/one/checkpoint_{best:08d}"
    assert config.run.name == "one"
    tensors = load_tensors(folder / Path(info["uri"]).name, "model", 1)
    ours = encoder.state_dict()
    assert all(torch.equal(ours[n], tensors[f"target_encoder.{n}"]) for n in ours)


def test_two_workers_see_the_same_samples_and_the_same_losses_as_one(one_worker, two_workers):
    one, two = one_worker[0], two_workers[0]
    assert chain(samples(one)) == chain(samples(two))
    ours, theirs = _losses(two / "metrics.jsonl"), _losses(one / "metrics.jsonl")
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[0] != ours[-1]


def test_a_killed_worker_costs_the_steps_since_the_checkpoint_and_no_sample(two_workers, capsys):
    folder, result, killed, shown = two_workers
    assert killed, "the run was over before its first checkpoint was committed"
    assert result.step == STEPS
    rows = samples(folder)
    attempts = sorted({r["attempt"] for r in rows})
    first, again = ([r for r in rows if r["attempt"] == a] for a in attempts)
    lost, resumed = max(row["step"] for row in first), min(row["step"] for row in again)
    assert lost % EPOCH != 0, "the kill hit the end of an epoch"
    assert resumed <= lost
    assert (resumed - 1) % 5 == 0  # after a checkpoint
    assert killed["pid"] in {row["pid"] for row in first} - {row["pid"] for row in again}

    trained = chain(rows)
    assert list(trained) == list(range(1, STEPS + 1))
    for start in range(1, STEPS, EPOCH):
        epoch = Counter(i for step in range(start, start + EPOCH) for i in trained[step])
        assert len(epoch) == 512
        assert set(epoch.values()) == {1}
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    lines = shown.splitlines()
    failure = next(i for i, line in enumerate(lines) if line.startswith("WARNING: worker "))
    # Worker 0 may meet the broken connection before Ray notices that worker 1 is gone.
    reasons = (
        r"worker 1 on [\d.]+ was lost \(ActorDiedError: ",
        r"worker 0 on [\d.]+ failed \(Run",
    )
    assert any(re.search(reason, lines[failure]) for reason in reasons), lines[failure]
    assert f"; failure 1 of 3; going on from step {resumed - 1}" in lines[failure]
    assert f"at step {resumed - 1}" in lines[failure + 1]
    seconds = min(row["time"] for row in again) - killed["time"]
    with capsys.disabled():
        print(f"\nkilled after step {lost}, at step {resumed} again {seconds:.1f} s later")


def test_every_worker_wrote_its_share_and_one_process_reads_them(two_workers):
    shares = sorted(Path(two_workers[1].last_checkpoint).glob("model-*.safetensors"))
    assert [path.stem for path in shares] == ["model-00000-of-00002", "model-00001-of-00002"]
    encoder, _, info = load_encoder(two_workers[1].last_checkpoint)
    assert (info["step"], info["world_size"], info["position"]) == (STEPS, 2, STEPS * 32)
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


def test_another_run_under_the_same_name_is_refused_before_any_worker_starts(
    two_workers, monkeypatch
):
    folder, *_ = two_workers
    cfg = change(
        _config((_train_of(folder), ""), folder.parent, name="two", workers=2),
        data={"batch_size": 64},
        optim={"lr": 0.5},
    )
    monkeypatch.setattr(launch, "_fit", lambda *_: pytest.fail("workers start"))
    with pytest.raises(CheckpointError, match=r"--data\.batch-size was 32.*--optim\.lr was"):
        pretrain(cfg)


def _train_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["data"]["train"]


def test_resume_with_the_real_loader_is_bitwise_and_goes_on_with_the_next_batch(
    cifar_shards, tmp_path
):
    manifest = read_manifest(cifar_shards[0])
    plan = make_plan(manifest.row_groups(), debug().data, 0)
    data = DataSource(train_batches, plan.batches_per_epoch, manifest.manifest_hash)
    assert data.steps_per_epoch == 16

    def run(name, **overrides):
        storage = tmp_path / name
        cfg = _config(cifar_shards, storage, steps=20, log_every=3, log_samples=True, **overrides)
        for stop in (11, 20) if name == "interrupted" else (20,):
            stopped = change(cfg, run={"stop_after": stop})
            assert train(stopped, Worker(), data, FolderStore(storage / "ck")).step == stop
        tensors = [
            load_tensors(storage / "ck" / "checkpoint_00000020", group, 1)
            for group in ("model", "optimizer", "loop")
        ]
        return tensors, chain(samples(storage / "debug")), storage / "debug" / "metrics.jsonl"

    whole, interrupted = run("whole"), run("interrupted")
    assert interrupted[1] == whole[1]
    assert _losses(interrupted[2]) == _losses(whole[2])
    for ours, theirs in zip(interrupted[0], whole[0], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_a_stopped_target_the_run_collapses_and_the_watch_stops_it(
    cifar_shards, ray_local, tmp_path, monkeypatch
):
    overrides = ["--data.batch-size", "64", "--optim.lr", "1e-2", "--optim.start-lr", "1e-2"]
    common = ["debug", "--data.train", cifar_shards[0], "--run.storage", str(tmp_path)]
    common += ["--run.steps", "200", "--run.log-every", "10", "--run.checkpoint-every", "1000"]
    control = ["pretrain", *common, *overrides, "--run.threads", "1", "--objective.target", "self"]
    monkeypatch.setattr(sys, "argv", control)
    with pytest.raises(SystemExit) as ended:  # its text, on stderr, and status 1
        main()
    message = str(ended.value)
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert "the encoder has collapsed at step" in message
    assert "--objective.target ema" in message
    rows = read_metrics(tmp_path / "debug" / "metrics.jsonl")
    assert rows[-1]["collapsed"] is True
    assert rows[-1]["step"] < 200
    assert [row["step"] for row in rows] == list(range(10, rows[-1]["step"] + 1, 10))  # no retry
    assert not list((tmp_path / "debug").glob("checkpoint_*"))


def test_a_run_that_cannot_fit_is_refused_with_the_flags(ray_local, cifar_shards, tmp_path):
    fits = _config(cifar_shards, tmp_path, workers=4, cpus_per_worker=0.75)
    check_fits(fits)
    with pytest.raises(ValueError, match=r"4 CPUs; 4 workers at --run\.cpus-per-worker 1 "):
        check_fits(change(fits, run={"cpus_per_worker": 1.0}))
    with pytest.raises(ValueError, match=r"--run\.gpu"):
        check_fits(
            change(
                fits,
                run={"gpu": True, "workers": 64, "cpus_per_worker": 0.01},
                data={"lanes": 64, "batch_size": 64},
            )
        )
    with pytest.raises(ValueError, match=r"--run\.cpus-per-worker 9"):
        pretrain(change(fits, run={"cpus_per_worker": 9.0}))


def test_bad_input_is_named_before_anything_starts(cifar_shards, tmp_path):
    with pytest.raises(ValueError, match=r"--data\.train"):
        pretrain(debug())
    with pytest.raises(ValueError, match=r"--data\.batch-size"):
        pretrain(change(_config(cifar_shards, tmp_path), data={"batch_size": 1024}))
    with pytest.raises((ValueError, OSError), match="nowhere"):
        pretrain(change(_config(cifar_shards, tmp_path), data={"train": str(tmp_path / "nowhere")}))
    absent = _config(cifar_shards, tmp_path, init_from=str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="absent"):
        pretrain(absent)


def test_recipes_are_complete_and_headed_by_their_command():
    for name, (line, cfg) in RECIPES.items():
        doc = REGISTERED[name].__doc__
        assert line
        assert f"python -m pipelines.pretrain {name} --data.train" in doc
        assert cfg.run.name == name
        assert cfg.run.steps > cfg.optim.warmup_steps
    paper = RECIPES["ijepa_vith14_in1k"][1]
    assert paper.data.batch_size == 2048
    assert (paper.run.steps, paper.optim.warmup_steps) == (187_500, 25_000)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _ask_until_dead(queue):
    for _ in range(1_000):
        queue.qsize()


def test_a_lost_progress_queue_does_not_end_a_run(ray_local, capsys, monkeypatch):
    import ray
    from ray.util import queue as queues

    options = []

    class Watched(queues.Queue):
        def __init__(self, *, actor_options):
            options.append(actor_options)
            super().__init__(actor_options=actor_options)

    monkeypatch.setattr(queues, "Queue", Watched)
    shown = io.StringIO()
    with worker_lines(shown) as queue:
        say = say_into(queue)
        say("step 1/3")
        wait_until(lambda: "step 1/3" in shown.getvalue())
        ray.kill(queue.actor)
        with pytest.raises(ray.exceptions.RayActorError):  # one that is dying may still take lines
            _ask_until_dead(queue)
        say("step 2/3")
        say("step 3/3")
    lost = "WARNING: the process that brings progress lines here is lost; the run goes on"
    assert shown.getvalue() == f"step 1/3\n{lost}\n"
    assert capsys.readouterr().out == "step 2/3\nstep 3/3\n"
    place = options[0]["scheduling_strategy"]  # where the driver is: lost only with the run
    assert (place.node_id, place.soft) == (ray.get_runtime_context().get_node_id(), False)


def test_progress_is_one_rewritten_line_on_a_terminal_and_plain_lines_elsewhere():
    plain, terminal = io.StringIO(), _Terminal()
    lines = ("step 1/3 loss 2", "step 2/3 loss 1", "WARNING: [x]", "step 3/3 loss 0")
    for stream in (plain, terminal):
        printer = LinePrinter(stream)
        for line in lines:
            printer.show(line)
        printer.end()
    assert plain.getvalue() == "".join(f"{line}\n" for line in lines)
    shown = terminal.getvalue()
    assert shown.count("\n") == 2  # the warning, and the last state of the bar
    assert "WARNING: [x]" in shown.split("\n")[0]
    assert "step 3/3 loss 0" in shown.split("\n")[1]
