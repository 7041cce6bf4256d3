"""Every command on S3 that refuses, resets, throttles and breaks off: it goes on, bytes equal.

Ingest has a file of its own, `ingestion/test_s3_hiccups.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import s3fs
from PIL import Image

from helpers.embedding import embed_here
from helpers.pipelines.fake_training import FolderStore, change
from helpers.s3_proxy import S3Proxy, proxied
from models.file_systems import url_to_fs
from pipelines import embed as embed_module
from pipelines.config.ingest import IngestConfig
from pipelines.config.jobs import EmbedConfig, EvaluateConfig, ExportConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_manifest
from pipelines.embed import embed
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.ingest import ingest
from pipelines.loading.loader import train_batches
from pipelines.loading.plan import make_plan
from pipelines.recipes.images import debug
from pipelines.runs.run_folder import read_metrics
from pipelines.training.contract import DataSource, Worker
from pipelines.training.launch import pretrain
from pipelines.training.trainer import train
from serve.embeddings.replica.embedder import Encoder
from serve.embeddings.settings import ServeSettings

BUCKET = "outages"
OUTAGE_S = 1.5
TROUBLES = ("slow_down", "reset", "cut", "late", "trickle")
RECORDED = ("date", "seconds", "settings", "out", "config.json")
"""What a command says of when and where it ran, and the digest of a file that has it."""


def pictures(count: int) -> Iterator[tuple[str, bytes]]:
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        yield f"{number % 4}/{number}.png", file.getvalue()


@pytest.fixture(scope="module")
def through(s3: dict[str, str], small_checkpoint: str) -> Iterator[S3Proxy]:
    """Raw pictures of two splits, and a checkpoint, on S3 behind a proxy."""
    with proxied(s3) as proxy:
        fs, _ = url_to_fs("s3://")
        fs.mkdir(BUCKET)
        fs.pipe({f"{BUCKET}/raw/{name}": data for name, data in pictures(40)})
        fs.put(f"{small_checkpoint}/", f"{BUCKET}/checkpoint/", recursive=True)
        yield proxy


@pytest.fixture(scope="module")
def prepared(through: S3Proxy) -> S3Proxy:
    """Shards and an artifact, made while all was well."""
    with pytest.MonkeyPatch.context() as patch:
        from helpers.pipelines.ingestion import run_backwards
        from pipelines import ingest as ingest_module

        patch.setattr(ingest_module, "_run", run_backwards)
        patch.setattr(ingest_module.ray, "is_initialized", lambda: True)
        raw, shards = f"s3://{BUCKET}/raw", f"s3://{BUCKET}/shards"
        ingest(IngestConfig(source=raw, out=shards, row_group_rows=8, shard_bytes=20_000))
    export(ExportConfig(checkpoint=f"s3://{BUCKET}/checkpoint", out=f"s3://{BUCKET}/artifact"))
    return through


@pytest.fixture
def proxy(prepared: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    monkeypatch.setattr(embed_module, "_run", embed_here)
    prepared.end_trouble()
    yield prepared
    prepared.end_trouble()


def run_export(out: str) -> None:
    export(ExportConfig(checkpoint=f"s3://{BUCKET}/checkpoint", out=out))


def run_embed(out: str) -> None:
    embed(EmbedConfig(artifact=f"s3://{BUCKET}/artifact", data=f"s3://{BUCKET}/shards", out=out))


def run_evaluate(out: str) -> None:
    shards = f"s3://{BUCKET}/shards"
    checkpoint = f"s3://{BUCKET}/checkpoint"
    evaluate(
        EvaluateConfig(checkpoint=checkpoint, data=shards, test=shards, out=out, probe_epochs=1)
    )


def load_for_serving(out: str) -> None:
    """A replica's load; what it computes goes where the others write."""
    encoder = Encoder(ServeSettings(artifact=f"s3://{BUCKET}/artifact"))
    weights = [value.numpy().tobytes() for value in encoder._encoder.state_dict().values()]
    fs, path = url_to_fs(f"{out}/weights")
    fs.pipe_file(path, b"".join(weights))


def contents(proxy: S3Proxy, out: str) -> dict[str, Any]:
    """Every file that was written, but for what a command records of itself."""
    fs, root = url_to_fs(out)
    found: dict[str, Any] = {}
    for path in fs.find(root):
        data, name = fs.cat_file(path), path.removeprefix(f"{root}/")
        if name.endswith(".html"):
            continue  # holds the date
        if name.endswith(".json"):
            found[name] = without_records(json.loads(data))
        else:
            found[name] = data
    return found


def without_records(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_records(v) for k, v in value.items() if k not in RECORDED}
    return value


Command = Callable[[str], None]
COMMANDS: list[Command] = [run_export, run_embed, run_evaluate, load_for_serving]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_goes_on_after_an_outage_and_through_errors(
    proxy: S3Proxy, command: Command
) -> None:
    out = f"s3://{BUCKET}/{command.__name__}"
    proxy.reset()
    command(f"{out}-calm")
    asked = sum(proxy.requests.values())
    expected = contents(proxy, f"{out}-calm")
    assert expected

    random, answered, outages = Random(0), [0], []

    def meets(_: Any) -> str:
        """One trouble in ten requests, and none of them answered for a moment halfway."""
        answered[0] += 1
        if answered[0] == asked // 2:
            proxy.rule = None
            outages.append(proxy.trouble_for(OUTAGE_S, *TROUBLES))
        return random.choice(TROUBLES) if random.random() < 0.1 else ""

    proxy.reset()
    proxy.rule = meets
    command(f"{out}-disturbed")
    outages[0].join()
    assert proxy.spoiled
    assert contents(proxy, f"{out}-disturbed") == expected


WEIGHTS = "model-00000-of-00001.safetensors"


def source_of(cfg: PretrainConfig) -> DataSource:
    manifest = read_manifest(cfg.data.train)
    plan = make_plan(manifest.row_groups(), cfg.data, cfg.run.seed)
    return DataSource(train_batches, plan.batches_per_epoch, manifest.manifest_hash)


@pytest.mark.ray
def test_a_run_goes_on_after_an_outage_without_using_up_a_failure(
    ray_s3: S3Proxy,
    cifar_shards: tuple[str, str],
    s3: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data, checkpoints and metrics on S3, and no failure allowed."""
    for key, value in (s3 | {"AWS_ENDPOINT_URL": ray_s3.url}).items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs, _ = url_to_fs("s3://")
    fs.makedirs("outage-runs", exist_ok=True)
    fs.put(f"{cifar_shards[0]}/", "outage-runs/shards/", recursive=True)
    cfg = change(
        debug(),
        data={"train": "s3://outage-runs/shards"},
        run={
            **{"storage": "s3://outage-runs/runs", "steps": 24, "log_every": 1},
            **{"checkpoint_every": 8, "threads": 1, "max_failures": 0},
        },
    )
    down = []

    def at_the_first_checkpoint(request: Any) -> str:
        if not down and request.command == "PUT" and "checkpoint_00000008" in request.path:
            down.append(ray_s3.down_for(6))
        return ""

    ray_s3.rule = at_the_first_checkpoint
    shown = io.StringIO()
    assert pretrain(change(cfg, run={"name": "outage"}), stream=shown).step == 24
    ray_s3.end_trouble()
    assert down
    down[0].join()
    assert "worker 0 failed" not in shown.getvalue()
    last = "checkpoint_00000024"
    here = change(cfg, data={"train": cifar_shards[0]}, run={"storage": str(tmp_path)})
    train(here, Worker(), source_of(here), FolderStore(tmp_path / "calm"))
    fs.get_file(f"outage-runs/runs/outage/{last}/{WEIGHTS}", str(tmp_path / "weights"))
    expected = (tmp_path / "calm" / last / WEIGHTS).read_bytes()
    assert (tmp_path / "weights").read_bytes() == expected
    fs.get_file("outage-runs/runs/outage/metrics.jsonl", str(tmp_path / "metrics"))
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics") if "loss" in row]
    assert steps == list(range(1, 25))
    s3fs.S3FileSystem.clear_instance_cache()
