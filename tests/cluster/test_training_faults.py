"""A run on two hosts is disturbed by what happens to processes, hosts and cables.

After every fault the run must go on by itself. At the end, `training` accounts for every sample.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from helpers.cluster import network
from helpers.cluster.cluster import RigCluster
from helpers.cluster.faults import RESTART_S, Begin
from helpers.cluster.jobs import Job
from helpers.cluster.report import record_job
from helpers.cluster.runs import WORKER, pretrain
from helpers.cluster.s3 import RigS3

pytestmark = pytest.mark.slow


def test_a_worker_is_killed(cluster: RigCluster, begin: Begin) -> None:
    watch = begin("1", "training worker SIGKILL")
    cluster.rig["w2"].signal(WORKER)
    lost = watch.restarted(RESTART_S)
    watch.record("all workers start again from the newest checkpoint", f"{lost} steps repeated")
    assert lost <= 2 * 20


@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_a_worker_is_killed_in_the_start(cluster: RigCluster, begin: Begin, after_s: float) -> None:
    """Before the train function gives its first answer: phases that Ray Train does not retry."""
    watch = begin("1b", f"a worker killed again, {after_s:g} s after it was started anew")
    host = cluster.rig["w2"]
    host.signal(WORKER)
    first = set(host.processes(WORKER))
    deadline = time.monotonic() + RESTART_S
    while not (found := set(host.processes(WORKER)) - first):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(after_s)
    assert found & set(host.signal(WORKER)), "the worker had gone by itself"
    lost = watch.restarted(RESTART_S)
    watch.record("the workers start again", f"{lost} steps repeated")


def test_a_worker_stands_still(cluster: RigCluster, begin: Begin) -> None:
    watch = begin("own 1", "training worker SIGSTOP for 20 s")
    stopped = cluster.rig["w2"].signal(WORKER, signal.SIGSTOP)
    time.sleep(20)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    watch.went_on(RESTART_S)
    watch.record("training stands still and goes on", "nothing")


def test_ray_dies_on_a_host(cluster: RigCluster, begin: Begin) -> None:
    watch = begin("2", "raylet of a worker host SIGKILL")
    cluster.rig["w2"].signal(r"raylet/raylet ")
    lost = watch.restarted(2 * RESTART_S)
    watch.record("the head starts Ray there again, then the workers", f"{lost} steps repeated")


def test_a_host_loses_power(cluster: RigCluster, s3: RigS3, begin: Begin) -> None:
    """In the middle of the upload of a checkpoint, which S3 does not answer just then."""
    watch = begin("3", "host power off in an upload of a checkpoint, on again after 30 s")
    s3.proxy.reset()
    while not any("/checkpoint_" in path for method, path in s3.proxy.requests if method == "PUT"):
        time.sleep(0.01)
    s3.proxy.begin_trouble(1.0, "hang")
    time.sleep(1)
    cluster.rig["w2"].power_off()
    s3.proxy.end_trouble()
    time.sleep(30)
    cluster.rig["w2"].power_on()
    lost = watch.restarted(2 * RESTART_S)
    watch.record("the head starts Ray there again, then the workers", f"{lost} steps repeated")


def test_a_cable_is_out_for_seconds(cluster: RigCluster, begin: Begin) -> None:
    watch = begin("4a", "link of a host down for 20 s")
    with network.cut("w2"):
        time.sleep(20)
    watch.went_on(RESTART_S)
    watch.record("training stands still and goes on", "nothing")


def test_a_cable_is_out_for_minutes(cluster: RigCluster, begin: Begin) -> None:
    watch = begin("4b", "link of a host down for 120 s")
    with network.cut("w2"):
        time.sleep(120)
    lost = watch.restarted(2 * RESTART_S)
    watch.record("the host counts as lost, then joins again", f"{lost} steps repeated")


def test_two_workers_do_not_reach_each_other(cluster: RigCluster, begin: Begin) -> None:
    watch = begin("own 2", "no packet between the two workers for 20 s, both reach the head")
    one, other = cluster.rig["w1"], cluster.rig["w2"]
    with network.parted(one.name, one.address, other.name, other.address):
        time.sleep(20)
    watch.went_on(RESTART_S)
    watch.record("training stands still and goes on", "nothing")


def test_a_slow_and_lossy_network(begin: Begin) -> None:
    watch = begin("7", "a host behind 50 ms each way and 2% loss for 40 s")
    with network.slow("w2", ms=50, loss=0.02):
        time.sleep(40)
    watch.went_on(RESTART_S)
    watch.record("steps take longer", "nothing")


def test_s3_refuses_connections_in_training(s3: RigS3, begin: Begin) -> None:
    watch = begin("5a", "S3 refuses connections for 60 s, in training")
    s3.proxy.down()
    time.sleep(60)
    s3.proxy.up()
    watch.went_on(RESTART_S)
    watch.record("training goes on; uploads are repeated", "nothing")


def test_s3_takes_requests_and_does_not_answer(s3: RigS3, begin: Begin) -> None:
    watch = begin("own 3", "S3 accepts requests and does not answer for 45 s, in training")
    s3.proxy.begin_trouble(1.0, "hang")
    time.sleep(45)
    s3.proxy.end_trouble()
    watch.went_on(RESTART_S)
    watch.record("training goes on or waits; nothing is restarted", "nothing")


@pytest.mark.parametrize(
    ("number", "does", "rate", "troubles"),
    [
        ("6", "answers 10% of requests with 503 or a reset", 0.1, ("reset", "slow_down")),
        # Bodies that break off or come slowly; requests that were done, whose answer is lost.
        ("own 4", "cuts, delays or loses half of its answers", 0.5, ("cut", "trickle", "late")),
    ],
    ids=["refused", "cut"],
)
def test_s3_spoils_requests_in_training(
    s3: RigS3, begin: Begin, number: str, does: str, rate: float, troubles: tuple[str, ...]
) -> None:
    watch = begin(number, f"S3 {does} for 30 s, in training")
    s3.proxy.reset()
    s3.proxy.begin_trouble(rate, *troubles)
    time.sleep(30)
    s3.proxy.end_trouble()
    watch.went_on(RESTART_S)
    watch.record(f"{s3.proxy.spoiled} requests are repeated, nothing is noticed", "nothing")
    assert s3.proxy.spoiled


@pytest.mark.parametrize(
    ("number", "fault", "folder", "seconds"),
    [
        ("9", "disk of a host full", "/tmp", 60),
        ("own 5", "shared memory of a host full", "/dev/shm", 30),
    ],
    ids=["disk", "shared memory"],
)
def test_a_file_system_is_full(
    cluster: RigCluster, begin: Begin, number: str, fault: str, folder: str, seconds: int
) -> None:
    """Checkpoints of a host whose disk is full fail until there is room."""
    watch = begin(number, f"{fault} for {seconds} s")
    host = cluster.rig["w2"]
    host.fill(folder)
    time.sleep(seconds)
    host.free(folder)
    lost = watch.settled(2 * RESTART_S)
    watch.record("training goes on", f"{lost} steps repeated")


def test_two_jobs_of_one_name(cluster: RigCluster, training: Job, shards: str) -> None:
    second = cluster.start_job("second", *pretrain(shards, "disturbed"))
    assert second.wait_for_end(RESTART_S) == "FAILED"
    told = second.log()
    record_job(
        "15",
        "two jobs with one --run.name",
        "the second is refused before it starts",
        "nothing",
        None,
        told[told.index("error:") :],
        "test_two_jobs_of_one_name",
    )
    assert "in use by" in told
    training.wait_for_step(training.last_step() + 2, RESTART_S)


def test_the_driver_is_killed(
    cluster: RigCluster, training: Job, shards: str, begin: Begin
) -> None:
    """The lease of the dead driver does not keep the same command from going on."""
    watch = begin("own 6", "driver of the job SIGKILL, the same command again")
    cluster.rig["head"].signal(r"python pipelines/pretrain\.py")
    assert training.wait_for_end(RESTART_S) == "FAILED"
    again = cluster.start_job("disturbed-again", *pretrain(shards, "disturbed"))
    training.name, watch.at = again.name, 0
    lost = watch.restarted(RESTART_S)
    watch.record("the job fails; the command again resumes at once", f"{lost} steps repeated")


def test_a_job_is_stopped(cluster: RigCluster, training: Job, begin: Begin) -> None:
    watch = begin("13", "ray job stop")
    seconds = cluster.stop_job(training)
    watch.record(f"stopped after {seconds:.0f} s; the command again resumes", "")
