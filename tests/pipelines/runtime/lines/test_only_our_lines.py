"""A run with a Ray of its own, of which a worker is killed: the terminal has our lines alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.own_ray import without_ray
from helpers.repository import ROOT

OURS = (
    r"step \d+/\d+ loss .*",
    r"WARNING: worker .*",
    r"waiting for .*",
    r"others hold .* CPUs .*",
    r"there is room for the workers .*",
    r"resuming run 'debug' at step \d+",
    r"(best|last) checkpoint /.*",
    r"run /.* at step \d+",
)
LIMIT_S = 240


def pid_of_a_worker(run: Path, first_step: int) -> int:
    """Waits until a checkpoint is committed and rank 1 has trained past a step."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (run / "checkpoint_manager_snapshot.json").exists():
            for path in run.glob("samples-rank1*.jsonl"):
                rows = [
                    json.loads(line) for line in path.read_text().splitlines(True) if "\n" in line
                ]
                if rows and rows[-1]["step"] >= first_step:
                    return int(rows[-1]["pid"])
        time.sleep(0.05)
    raise TimeoutError(f"no checkpoint in {run}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("programs")
def test_a_run_with_a_lost_worker_prints_only_our_lines(
    cifar_shards: tuple[str, str], tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "pipelines.pretrain", "debug", "--data.train", cifar_shards[0]),
        *("--run.storage", str(tmp_path), "--run.workers", "2", "--run.threads", "1"),
        *("--run.steps", "60", "--run.checkpoint-every", "5", "--run.log-every", "5"),
        "--run.log-samples",
    ]
    env = without_ray() | {"RAY_ADDRESS": "local"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        os.kill(pid_of_a_worker(tmp_path / "debug", 7), signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    assert err == ""
    lines = out.splitlines()
    assert [line for line in lines if not any(re.fullmatch(ours, line) for ours in OURS)] == []
    assert sum(line.startswith("WARNING: worker ") for line in lines) == 1
    assert sum(line.startswith("resuming run ") for line in lines) == 1
