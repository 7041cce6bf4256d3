"""A run that lasts and is disturbed, and the account of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from helpers.cluster.accounting import chain, faults_of_chain, repeated
from helpers.cluster.cluster import RigCluster
from helpers.cluster.data import BATCH, SAMPLES
from helpers.cluster.faults import LOG_EVERY, RESTART_S
from helpers.cluster.jobs import ENDED, Job
from helpers.cluster.s3 import BUCKET, RigS3

CHECKPOINT_EVERY = 20
WORKER = r"^ray::RayTrainWorker|^ray::_RayTrainWorker"
"""What the processes of its workers are called."""


def pretrain(
    shards: str, run: str, *more: str, workers: str = "2", cpus: int = 2
) -> tuple[str, ...]:
    """At most one worker a host, which has 3 CPUs; one of all must be free to read data with."""
    return (
        *("python", "pipelines/pretrain.py", "debug", "--data.train", shards),
        *("--run.storage", f"s3://{BUCKET}/runs", "--run.name", run, "--run.log-samples"),
        *("--run.workers", workers, "--run.cpus-per-worker", str(cpus), "--run.threads", "1"),
        *("--run.steps", "100000", "--run.max-failures", "20"),
        *("--run.log-every", str(LOG_EVERY)),
        *("--run.checkpoint-every", str(CHECKPOINT_EVERY), *more),
    )


@contextmanager
def disturbed(cluster: RigCluster, run: str, command: tuple[str, ...]) -> Iterator[Job]:
    """A run from after its first checkpoint on; at its end every sample is accounted for."""
    job = cluster.start_job(run, *command)
    try:
        job.wait_for_step(2 * CHECKPOINT_EVERY, RESTART_S)  # its first checkpoint is committed
        yield job
    finally:  # the next test needs its CPUs
        if job.status() not in ENDED:
            cluster.stop_job(job)
    # The last attempt of the chain: it ends by itself, so that the sample log is complete.
    stop = job.last_step() + 2 * SAMPLES // BATCH
    cluster.job(*command, "--run.stop-after", str(stop))
    check_samples(cluster.rig.s3, run, stop)


def check_samples(s3: RigS3, run: str, last_step: int) -> None:
    """No sample is lost or doubled in the chain that made the weights of the last step."""
    lines = s3.lines(f"runs/{run}/samples-rank*.jsonl")
    print(f"{run}: {last_step} steps; {repeated(lines)} were taken more than once")
    assert faults_of_chain(chain(lines, last_step), last_step, SAMPLES, BATCH) == []
