"""The whole way as docs/cluster.md describes it, from `ray up` to HTTP on every host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.cluster.cluster import RigCluster
from helpers.cluster.data import upload_pictures
from helpers.cluster.rig import ADDRESSES
from helpers.cluster.s3 import BUCKET
from helpers.cluster.serving import embed, url_of, write_serve_config

pytestmark = pytest.mark.slow

URI = f"s3://{BUCKET}"


def test_the_walk(cluster: RigCluster, tmp_path: Path) -> None:
    """Every job of the product, once, on a head and two workers with token authentication."""
    s3 = cluster.rig.s3
    assert sorted(cluster.nodes()) == sorted(ADDRESSES.values())
    upload_pictures(s3, "raw")
    cluster.job(
        *("python", "pipelines/ingest.py", "--source", f"{URI}/raw"),
        *("--out", f"{URI}/shards/train", "--row-group-rows", "32"),
    )
    printed = cluster.job(
        *("python", "pipelines/pretrain.py", "debug", "--data.train", f"{URI}/shards/train"),
        *("--run.storage", f"{URI}/runs", "--run.workers", "2", "--run.cpus-per-worker", "2"),
    )
    assert f"run {URI}/runs/debug at step 10" in printed
    cluster.job(
        *("python", "pipelines/export.py", "--checkpoint", f"{URI}/runs/debug"),
        *("--out", f"{URI}/artifacts/debug"),
    )
    cluster.job(
        *("python", "pipelines/evaluate.py", "--checkpoint", f"{URI}/runs/debug"),
        *("--data", f"{URI}/shards/train", "--test", f"{URI}/shards/train"),
        *("--out", f"{URI}/evaluation"),
    )
    results = json.loads(s3.files().cat_file(f"{BUCKET}/evaluation/results.json"))
    assert len(results["rows"]) >= 3
    cluster.job(
        *("python", "pipelines/embed.py", "--workers", "2"),
        *("--artifact", f"{URI}/artifacts/debug", "--data", f"{URI}/shards/train"),
        *("--out", f"{URI}/vectors"),
    )
    assert s3.files().ls(f"{BUCKET}/vectors")

    config = write_serve_config(tmp_path / "serve.yaml", f"{URI}/artifacts/debug")
    cluster.serve_deploy(config)
    prints = {embed(url_of(address))["fingerprint"] for address in ADDRESSES.values()}
    assert len(prints) == 1
    cluster.laptop("serve", "shutdown", "-y", "-a", cluster.dashboard)
    cluster.say = lambda _: None  # the transcript goes on with `ray down`
