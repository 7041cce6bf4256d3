"""An elastic run on a cluster whose nodes come and go: same samples and losses as a fixed run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.pipelines.fake_training import FolderStore, change
from helpers.pipelines.sample_logs import chain, samples, samples_so_far
from helpers.repository import ROOT
from pipelines.dataset.shards import read_manifest
from pipelines.loading.loader import train_batches
from pipelines.recipes.images import debug
from pipelines.runs.run_folder import read_metrics
from pipelines.training.contract import DataSource, Worker
from pipelines.training.trainer import train

STEPS, EPOCH = 64, 16
PATIENCE_S = 240
MODEL: dict[str, Any] = {"encoder": "vit_small32", "patch_size": 4}

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Nodes:
    """Nodes on this host that come and go, beside whatever Ray this process is connected to."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self.address: str = self._add(num_cpus=1).address

    def _add(self, **settings: Any) -> Any:
        return self._cluster.add_node(wait=False, object_store_memory=100_000_000, **settings)

    def add(self) -> Any:
        """Adds a node with room for one worker."""
        return self._add(num_cpus=2)

    def take_away(self, node: Any, seconds: float) -> None:
        """Gives notice that a node is going to be taken away, as a cloud does."""
        command = [
            *(str(Path(sys.executable).parent / "ray"), "drain-node", "--node-id", node.node_id),
            *("--address", self.address, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "spot", "--deadline-remaining-seconds", str(int(seconds))),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def lose(self, node: Any) -> None:
        """Kills a node."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    settings = {
        "RAYJEPA_ASK_EVERY_S": "0.2",
        "RAYJEPA_GROW_EVERY_S": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "RAY_worker_niceness": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    nodes = Nodes()
    yield nodes
    nodes.close()


class Run:
    """An elastic run in a process of its own."""

    def __init__(self, data: str, storage: Path, address: str) -> None:
        self.folder = storage / "elastic"
        self._log = storage / "output.txt"
        self.began: list[float] = []
        command = [
            *(
                sys.executable,
                str(ROOT / "pipelines" / "pretrain.py"),
                "debug",
                "--data.train",
                data,
            ),
            *("--run.storage", str(storage), "--run.name", "elastic", "--run.workers", "1..2"),
            *("--run.cpus-per-worker", "1.5", "--run.steps", str(STEPS), "--run.log-every", "1"),
            # A fraction of a second a step, so that the run is still there when a node comes.
            *("--model.encoder", MODEL["encoder"], "--model.patch-size", str(MODEL["patch_size"])),
            *("--run.checkpoint-every", "1000", "--run.threads", "1", "--run.log-samples"),
        ]
        env = {**os.environ, "RAY_ADDRESS": address}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=storage)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, workers: int, groups: int) -> None:
        """Waits until the group of this number trains, with this many workers, in an epoch."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output
            rows = samples_so_far(self.folder)
            attempts = sorted({row["attempt"] for row in rows})
            newest = [row for row in rows if attempts and row["attempt"] == attempts[-1]]
            steps = {row["step"] for row in newest}
            ranks = {row["rank"] for row in newest}
            if len(attempts) == groups and len(steps) > 2 and len(ranks) == workers:
                self.began.append(time.monotonic())
                return
            time.sleep(0.1)
        raise TimeoutError(self.output)

    def wait(self) -> None:
        assert self.process.wait(PATIENCE_S) == 0, self.output


def fixed_run(data: str, storage: Path) -> tuple[dict[int, list[str]], list[float]]:
    """Samples and losses of one process that nothing happens to."""
    run = {"steps": STEPS, "log_every": 1, "checkpoint_every": 1000, "threads": 1}
    run |= {"storage": str(storage), "name": "fixed", "log_samples": True}
    cfg = change(debug(), data={"train": data}, run=run, model=MODEL)
    source = DataSource(train_batches, EPOCH, read_manifest(data).manifest_hash)
    train(cfg, Worker(), source, FolderStore(storage / "checkpoints"))
    return chain(samples(storage / "fixed")), losses(storage / "fixed")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_two_one_two_workers_train_as_a_fixed_group(
    cifar_shards: tuple[str, str],
    tmp_path: Path,
    nodes: Nodes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = cifar_shards[0]
    first, second = nodes.add(), nodes.add()
    began = time.monotonic()
    run = Run(data, tmp_path, nodes.address)
    try:
        run.wait_for(workers=2, groups=1)
        nodes.take_away(second, 60)
        run.wait_for(workers=1, groups=2)
        third = nodes.add()
        run.wait_for(workers=2, groups=3)
        nodes.lose(third)
        run.wait()
    finally:
        run.process.kill()
    seconds = time.monotonic() - began
    rows = samples(run.folder)
    trained, ours = chain(rows), losses(run.folder)
    expected, theirs = fixed_run(data, tmp_path)
    assert first is not None
    assert trained == expected
    for start in range(1, STEPS, EPOCH):
        epoch = Counter(i for step in range(start, start + EPOCH) for i in trained[step])
        assert (len(epoch), set(epoch.values())) == (512, {1})
    assert ours == pytest.approx(theirs, abs=1e-4)
    with capsys.disabled():
        seen = [round(moment - began) for moment in run.began]
        print(f"\n{run.output}\n{seconds:.0f} s, groups seen after {seen} s")
        print(
            f"largest difference {max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.2e}"
        )
    assert re.search(r"stopping after step \d+: host [\d.]+ is going to be taken away", run.output)
    assert "there is room for 2 workers instead of 1" in run.output
    assert re.search(
        r"WARNING: worker 1 on [\d.]+ was lost .*; failure 1 of 3; going on", run.output
    )
