"""Batch embedding: every row once, the encoder's values, any number of workers.

N images, D features.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.embedding import embed_here
from models.artifacts.artifact import save_artifact
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from pipelines import embed as job
from pipelines.config.jobs import EmbedConfig
from pipelines.dataset import embeddings
from pipelines.dataset.shards import read_manifest, read_rows
from pipelines.embed import embed
from pipelines.evaluation.features import extract_features

pytestmark = pytest.mark.ray

PREP = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
Shards = tuple[str, str]


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        EncoderShape(image_size=32, patch_size=8, width=48, depth=1, heads=3)
    ).eval()


@pytest.fixture(scope="module")
def artifact(encoder: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("embed") / "artifact"
    save_artifact(folder, encoder, PREP, {"run": "r", "step": 7})
    return str(folder)


def _read(out: Path, record: dict) -> pa.Table:
    return pa.concat_tables([pq.read_table(out / file["file"]) for file in record["files"]])


def _values(table: pa.Table) -> np.ndarray:
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1)


def test_every_row_once_in_order_with_the_encoders_values(
    cifar_shards: Shards,
    artifact: str,
    encoder: VisionTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embeddings, "FILE_ROWS", (100, 8192))  # several files
    cfg = EmbedConfig(artifact=artifact, data=cifar_shards[0], out=str(tmp_path / "two"), workers=2)
    record = embed(cfg)
    table, source = _read(tmp_path / "two", record), read_rows(cifar_shards[0])
    assert len(record["files"]) > 3
    assert record["rows"] == read_manifest(cifar_shards[0]).num_samples == table.num_rows
    for name in ("sample_id", "label", "source_uri"):
        assert table[name].to_pylist() == source[name].to_pylist()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 48)
    expected = extract_features(encoder, PREP, source)
    np.testing.assert_allclose(_values(table), expected, atol=1e-5)
    assert record["provenance"] == {"run": "r", "step": 7}
    assert record["manifest_hash"] == read_manifest(cifar_shards[0]).manifest_hash

    # Killed after the first file, the next run makes the rest only, and they are the same.
    monkeypatch.setattr(job, "_run", embed_here)
    one = tmp_path / "one"
    one.mkdir()
    kept, *_ = [file["file"] for file in record["files"]]
    (one / kept).write_bytes((tmp_path / "two" / kept).read_bytes())
    stamp = (one / kept).stat().st_mtime_ns
    again = embed(dataclasses.replace(cfg, out=str(one), workers=1))
    assert again == record
    assert (one / kept).stat().st_mtime_ns == stamp
    np.testing.assert_allclose(_values(_read(one, again)), expected, atol=1e-5)

    # A finished folder is left alone; another job does not mix in.
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("nothing was missing"))
    assert embed(dataclasses.replace(cfg, out=str(one))) == record
    with pytest.raises(ValueError, match="holds something else"):
        embed(dataclasses.replace(cfg, out=str(one), pooling="patches"))


def test_a_run_on_s3_that_goes_on_finds_what_the_actors_wrote(
    cifar_shards: Shards,
    artifact: str,
    s3: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The actors write from other processes, behind the back of any listing remembered here."""
    import s3fs

    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(embeddings, "FILE_ROWS", (100, 8192))
    monkeypatch.setattr(job, "_run", embed_here)
    cfg = EmbedConfig(artifact=artifact, data=cifar_shards[0], out=str(tmp_path))
    record = embed(cfg)

    def upload(files: list[str]) -> None:
        other = s3fs.S3FileSystem(skip_instance_cache=True)
        other.mkdirs("embed", exist_ok=True)
        for file in files:
            other.pipe_file(f"embed/out/{file}", (tmp_path / file).read_bytes())

    upload([record["files"][0]["file"]])
    monkeypatch.setattr(job, "_run", lambda parts, *_: upload([part.file for part in parts]))
    assert embed(dataclasses.replace(cfg, out="s3://embed/out")) == record
    s3fs.S3FileSystem.clear_instance_cache()


def test_patches_keep_their_shape(
    cifar_shards: Shards,
    artifact: str,
    encoder: VisionTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "_run", embed_here)
    cfg = EmbedConfig(artifact=artifact, data=cifar_shards[1], out=str(tmp_path), pooling="patches")
    record = embed(cfg)
    table = _read(tmp_path, record)
    field = table.schema.field("embedding")
    assert record["shape"] == json.loads(field.metadata[b"shape"]) == [16, 48]
    expected = extract_features(encoder, PREP, read_rows(cifar_shards[1]), pooling="patches")
    np.testing.assert_allclose(_values(table).reshape(expected.shape), expected, atol=1e-5)


def test_a_foreign_folder_is_refused_before_any_work(
    cifar_shards: Shards, artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("started"))
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        embed(EmbedConfig(artifact=artifact, data=cifar_shards[1], out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
