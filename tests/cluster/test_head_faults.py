"""The head is lost: what goes on without it, and how all of it is there again."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from helpers.cluster.cluster import RigCluster
from helpers.cluster.data import upload_artifact
from helpers.cluster.faults import RESTART_S
from helpers.cluster.jobs import RESUMED
from helpers.cluster.report import record_job
from helpers.cluster.rig import ADDRESSES
from helpers.cluster.runs import check_samples, pretrain
from helpers.cluster.serving import embed, url_of, write_serve_config

pytestmark = pytest.mark.slow

WORKERS = [url_of(ADDRESSES[name]) for name in ("w1", "w2")]


@pytest.mark.parametrize("how", ["power", pytest.param("gcs", marks=pytest.mark.slow)])
def test_the_head_is_lost(cluster: RigCluster, shards: str, tmp_path: Path, how: str) -> None:
    """Without Redis: `ray up`, the same job and the same `serve deploy` bring everything back."""
    run = f"headless-{how}"
    train = functools.partial(pretrain, shards, run, cpus=1)  # Serve has one of each host
    config = tmp_path / "serve.yaml"
    write_serve_config(config, upload_artifact(cluster.rig.s3, "artifacts/head"))
    cluster.serve_deploy(config)
    job = cluster.start_job(run, *train())
    job.wait_for_step(30, RESTART_S)
    head = cluster.rig["head"]
    started = time.monotonic()
    if how == "power":
        head.power_off()
    else:
        head.signal("gcs/gcs_server ")
    embed(WORKERS[0])  # the replicas do not need the head
    if how == "power":
        head.power_on()
    cluster.up()
    again = cluster.start_job(f"{run}-2", *train("--run.take-over"))
    again.wait_until(lambda log: RESUMED.search(log) is not None, RESTART_S, "resumed")
    seconds = time.monotonic() - started
    cluster.stop_job(again)
    stop = again.last_step() + 20
    cluster.job(*train("--run.stop-after", str(stop)))
    check_samples(cluster.rig.s3, run, stop)
    cluster.serve_deploy(config)
    embed(WORKERS[0])
    cluster.laptop("serve", "shutdown", "-y", "-a", cluster.dashboard)
    fault = {"power": "head power off and on", "gcs": "GCS on the head SIGKILL"}[how]
    record_job(
        "8" if how == "power" else "own 7",
        fault,
        "ray up, the same job with --run.take-over, serve deploy: all there again",
        "nothing that S3 holds",
        seconds,
        again.log(),
        "test_the_head_is_lost",
    )
