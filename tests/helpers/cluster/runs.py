"""The command of a run that lasts, and the account of its samples."""

from __future__ import annotations

from helpers.cluster.accounting import chain, faults_of_chain, repeated
from helpers.cluster.data import BATCH, SAMPLES
from helpers.cluster.faults import LOG_EVERY
from helpers.cluster.s3 import BUCKET, RigS3

CHECKPOINT_EVERY = 20


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


def check_samples(s3: RigS3, run: str, last_step: int) -> None:
    """No sample is lost or doubled in the chain that made the weights of the last step."""
    lines = s3.lines(f"runs/{run}/samples-rank*.jsonl")
    print(f"{run}: {last_step} steps; {repeated(lines)} were taken more than once")
    assert faults_of_chain(chain(lines, last_step), last_step, SAMPLES, BATCH) == []
