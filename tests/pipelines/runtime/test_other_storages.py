"""A storage that only fsspec knows (here `memory://`) under every command, and its lease."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from helpers.embedding import embed_here
from models.file_systems import url_to_fs
from pipelines import embed as embed_module
from pipelines.config.ingest import IngestConfig
from pipelines.config.jobs import EmbedConfig, EvaluateConfig, ExportConfig
from pipelines.dataset.shards import verify_shards
from pipelines.embed import embed
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.ingest import ingest
from pipelines.runs.lease_file import PlainLeaseFile, TakenError, lease_file
from pipelines.runtime.errors import explain
from pipelines.runtime.faults import faults_of
from serve.embeddings.replica.embedder import Encoder
from serve.embeddings.settings import ServeSettings

ROOT = "memory://other"


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/other", recursive=True)


def test_every_command_works_there(
    memory: Any, in_process: None, small_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "_run", embed_here)
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        memory.pipe_file(f"/other/raw/c{number % 2}/a b+%20#{number}.png", file.getvalue())
    shards = f"{ROOT}/shards"
    ingest(IngestConfig(source=f"{ROOT}/raw", out=shards, row_group_rows=8))
    assert verify_shards(shards).num_samples == 24
    memory.put(f"{small_checkpoint}/", "/other/checkpoint/", recursive=True)
    artifact = export(ExportConfig(checkpoint=f"{ROOT}/checkpoint", out=f"{ROOT}/artifact"))
    assert embed(EmbedConfig(artifact=artifact, data=shards, out=f"{ROOT}/out"))["rows"] == 24
    sets = {"data": shards, "test": shards}
    evaluate(EvaluateConfig(checkpoint=artifact, **sets, out=f"{ROOT}/ev", probe_epochs=1))
    assert memory.exists("/other/ev/results.json")
    assert Encoder(ServeSettings(artifact=artifact)).card.dimensions > 0


def test_of_many_that_make_a_lease_one_gets_it_and_an_overwritten_one_notices(memory: Any) -> None:
    uri = f"{ROOT}/run/lease.json"
    assert isinstance(lease_file(uri), PlainLeaseFile)
    got: list[str] = []

    def ask(name: str) -> None:
        with contextlib.suppress(TakenError):
            got.append(lease_file(uri).create(name.encode()))

    threads = [threading.Thread(target=ask, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    fs, path = url_to_fs(uri)
    fs.pipe_file(path, b"somebody else's")
    with pytest.raises(TakenError):
        lease_file(uri).replace(b"mine", got[0])


def test_errors_of_its_package_are_told_with_the_flag() -> None:
    class HttpError(Exception):
        """As gcsfs raises it."""

    HttpError.__module__ = "gcsfs.retry"
    error = HttpError("Anonymous caller does not have storage.objects.list access, 401")
    error.add_note("--source: gs://bucket/raw")
    assert [fault.module for fault in faults_of(error)] == ["gcsfs"]
    assert explain(error, []) == f"--source: gs://bucket/raw: HttpError: {error}"
