"""Metrics of a run on S3: an upload that fails is told once, tried again, and never ends a run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.pipelines.fake_training import MEMORY, FolderStore, tiny_config
from helpers.s3_proxy import S3Proxy, proxied
from models.file_systems import url_to_fs
from models.patient_s3 import PATIENCE_ENV
from pipelines.runs.run_folder import METRICS, RunFolder
from pipelines.training import loggers
from pipelines.training.contract import Worker
from pipelines.training.trainer import train

STORAGE = "s3://metrics/runs"


@pytest.fixture
def proxy(s3: dict[str, str]) -> Iterator[S3Proxy]:
    with proxied(s3) as proxy:
        fs, _ = url_to_fs(STORAGE)
        fs.makedirs("metrics", exist_ok=True)
        yield proxy


def test_an_upload_that_fails_is_quick_and_made_up_for(proxy: S3Proxy) -> None:
    folder = RunFolder(f"{STORAGE}/one")
    (folder.local / METRICS).write_text("{}\n")
    proxy.down()
    started = time.monotonic()
    assert "Could not connect" in str(folder.sync())
    assert time.monotonic() - started < 30  # S3 would be waited for ten times as long
    proxy.up()
    assert folder.sync() is None
    fs, path = url_to_fs(f"{STORAGE}/one/{METRICS}")
    assert fs.cat_file(path) == b"{}\n"
    folder.close()


def test_a_run_trains_on_without_s3_and_says_so_once(
    proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of this test are local, so that only the metrics need S3."""

    class Store(FolderStore):
        def save(self, write, metrics):  # type: ignore[no-untyped-def]
            super().save(write, metrics)
            if metrics["step"] == 2:
                proxy.down()
            elif metrics["step"] == 10:
                proxy.up()

    monkeypatch.setenv(PATIENCE_ENV, "2")
    cfg = tiny_config(Path("x"), name="two", checkpoint_every=2)
    object.__setattr__(cfg.run, "storage", STORAGE)
    said: list[str] = []
    outcome = train(cfg, Worker(), MEMORY, Store(tmp_path), said.append)
    assert outcome.step == 12
    warnings = [line for line in said if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert f"metrics do not reach {STORAGE}/two" in warnings[0]
    fs, path = url_to_fs(f"{STORAGE}/two/{METRICS}")
    assert fs.cat_file(path).decode().splitlines()[-1].startswith('{"step": 12')


@pytest.mark.parametrize("name", ["h\u00f6he".encode(), b"h\xf6he", b"a/b"])
def test_a_host_of_any_name_writes_for_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    """Its name is in the file's, which S3 must be able to have."""
    monkeypatch.setattr("socket.gethostname", lambda: os.fsdecode(name))
    loggers._tensorboard(tmp_path, 0).close()
    (file,) = tmp_path.iterdir()
    assert file.name.encode().startswith(b"events.out.tfevents.")
    assert socket.gethostname() == os.fsdecode(name)
