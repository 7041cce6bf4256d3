"""Fixtures of the rig: the hosts, the cluster on them, data and a run that is disturbed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.cluster.cluster import RigCluster
from helpers.cluster.data import upload_pictures
from helpers.cluster.faults import Begin, Watch
from helpers.cluster.jobs import Job
from helpers.cluster.rig import Rig, missing, running_rig
from helpers.cluster.runs import disturbed, pretrain
from helpers.cluster.s3 import BUCKET, RigS3

TRANSCRIPT = "RAYJEPA_TRANSCRIPT"
DOWN_S = 150
"""Workers end some time after `ray down`: they wait for their head."""


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """Hosts and S3, on and without Ray."""
    if reason := missing():
        pytest.skip(f"no rig on this machine: {reason}")
    with running_rig() as made:
        yield made


@pytest.fixture(scope="session")
def s3(rig: Rig) -> RigS3:
    """The storage of the rig, in place of the session's other one."""
    return rig.s3


@pytest.fixture(scope="session")
def cluster(rig: Rig) -> Iterator[RigCluster]:
    """A Ray cluster on the rig by `ray up`, with all workers; `ray down` ends it.

    If RAYJEPA_TRANSCRIPT names a file, the commands of the walk and their output go there.
    """
    transcript: list[str] = []
    made = RigCluster(rig, say=transcript.append)
    try:
        made.up()
        yield made
        made.say = transcript.append
        made.down()
        if path := os.environ.get(TRANSCRIPT):
            Path(path).write_text("\n".join(transcript))
        deadline = time.monotonic() + DOWN_S
        while any(made.processes().values()):
            assert time.monotonic() < deadline, made.processes()
            time.sleep(1)
    finally:
        made.close_tunnel()


@pytest.fixture(scope="session")
def shards(cluster: RigCluster) -> str:
    """URI of `SAMPLES` pictures, ingested by a job."""
    source, uri = upload_pictures(cluster.rig.s3, "pictures"), f"s3://{BUCKET}/shards/pictures"
    cluster.job(
        *("python", "pipelines/ingest.py", "--source", source, "--out", uri),
        *("--row-group-rows", "32"),
    )
    return uri


@pytest.fixture(scope="module")
def training(cluster: RigCluster, shards: str) -> Iterator[Job]:
    """A run that all tests of a module disturb; at its end every sample is accounted for."""
    with disturbed(cluster, "disturbed", pretrain(shards, "disturbed")) as job:
        yield job


@pytest.fixture
def begin(training: Job, request: pytest.FixtureRequest) -> Begin:
    """Begins to watch the run for a fault, given its number and name."""
    return lambda number, fault: Watch(training, number, fault, request.node.name)
