"""Runs of other kinds than the one of test_training_faults.py lose a worker or a host."""

from __future__ import annotations

import re

import pytest

from helpers.cluster.cluster import RigCluster
from helpers.cluster.faults import RESTART_S, Watch
from helpers.cluster.runs import CHECKPOINT_EVERY, WORKER, disturbed, pretrain

pytestmark = pytest.mark.slow

GROWN = re.compile(
    r"room for 2 workers instead of 1\n.*training with 2 of .*\nstep \d+/", re.DOTALL
)


def test_an_elastic_run_goes_on_without_a_host(cluster: RigCluster, shards: str) -> None:
    command = pretrain(shards, "elastic", workers="1..2")
    with disturbed(cluster, "elastic", command) as job:
        # The hosts may have had something else to do when it started.
        job.wait_until(lambda log: "training with 2 of" in log, RESTART_S, "of two workers")
        fault = "elastic run 1..2, a host loses power for 90 s"
        watch = Watch(job, "11", fault, "test_an_elastic_run_goes_on_without_a_host")
        host = cluster.rig["w2"]
        host.power_off()
        lost = watch.restarted(2 * RESTART_S)
        assert "training with 1 of at most 2 workers" in watch.new()
        host.power_on()
        job.wait_until(lambda _: bool(GROWN.search(watch.new())), 2 * RESTART_S, "grown")
        watch.record("one worker goes on, and two when the host is back", f"{lost} steps repeated")


def test_a_sharded_run_loses_a_worker(cluster: RigCluster, shards: str) -> None:
    command = pretrain(shards, "sharded", "--run.parallel", "fsdp")
    with disturbed(cluster, "sharded", command) as job:
        fault = "worker of a sharded run SIGKILL"
        watch = Watch(job, "own 13", fault, "test_a_sharded_run_loses_a_worker")
        cluster.rig["w2"].signal(WORKER)
        lost = watch.restarted(RESTART_S)
        watch.record("all workers start again from the newest checkpoint", f"{lost} steps repeated")
        assert lost <= 2 * CHECKPOINT_EVERY
