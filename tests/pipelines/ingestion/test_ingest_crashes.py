"""Ingest after a crash or a kill: the same bytes, and nothing that was finished is done again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.data.ingest import kill_when_staged, start_ingest
from helpers.pipelines.ingestion import Crash, crash, run_quietly, settings
from pipelines import ingest as ingest_module
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import MANIFEST, read_manifest, read_rows
from pipelines.ingest import ingest
from pipelines.ingestion.staging import STAGING

CRASHES = {
    "while chunks are staged": "stage_chunk",
    "before the quarantine": "_write_quarantine",
    "while shards are written": "merge_shard",
    "after the shards": "read_shard_note",
    "before the manifest": "write_manifest",
    "after the manifest": "_clean_up",
}


@pytest.mark.parametrize("where", CRASHES)
def test_crash_anywhere_then_again_gives_the_same_bytes(
    where: str,
    in_process: None,
    cifar_sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one process, so that the crash falls exactly there."""
    source = cifar_sample / "test" / "cat"
    monkeypatch.setattr("pipelines.ingestion.listing.chunking.CHUNK_ITEMS", 16)
    expected = run_quietly(settings(source, tmp_path / "whole"))
    cfg = settings(source, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".part-{16 * 'a'}.parquet.1.tmp").write_bytes(
        b"what a kill leaves in mid-write"
    )
    name = CRASHES[where]
    with monkeypatch.context() as patch:
        third = crash_at_third(getattr(ingest_module, name))
        patch.setattr(ingest_module, name, third if name.endswith(("chunk", "shard")) else crash)
        with pytest.raises(Crash):
            ingest(cfg)
    if where == "after the manifest":
        assert read_manifest(cfg.out).num_samples == 80
    else:
        with pytest.raises(ValueError, match="not finished"):
            read_manifest(cfg.out)
    assert any((tmp_path / "out" / STAGING).iterdir())
    assert run_quietly(cfg) == expected


def crash_at_third(function):  # type: ignore[no-untyped-def]
    calls: list[None] = []

    def wrapped(row, cfg):  # type: ignore[no-untyped-def]
        calls.append(None)
        if len(calls) == 3:
            raise Crash
        return function(row, cfg)

    return wrapped


def test_settings_that_only_pack_reuse_staged_chunks(
    in_process: None, cifar_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(cifar_sample / "test" / "dog", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "write_manifest", crash)
        with pytest.raises(Crash):
            ingest(cfg)
    monkeypatch.setattr(ingest_module, "stage_chunk", crash)
    ingest(dataclasses.replace(cfg, row_group_rows=32))
    assert read_manifest(cfg.out).shards[0].row_groups[0] == 32


@pytest.mark.ray
def test_killed_at_half_and_run_again(ray_local: None, cifar_sample: Path, tmp_path: Path) -> None:
    """SIGKILL to `python -m pipelines.ingest` and to its Ray; the rest in this process."""
    source, out = cifar_sample / "train", tmp_path / "out"
    process = start_ingest(source, out, tmp_path / "log")
    assert 2 <= kill_when_staged(process, out, 2) < 8, (tmp_path / "log").read_text()
    with pytest.raises(ValueError, match="not finished"):
        read_manifest(out)
    staged = {path.name: path.stat().st_mtime_ns for path in (out / STAGING).glob("*.items.*")}
    keep = {}

    def remember(cfg: IngestConfig, manifest: object) -> None:
        keep.update({n: (out / STAGING / n).stat().st_mtime_ns for n in staged})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_module, "_clean_up", remember)
        ingest(IngestConfig(source=str(source), out=str(out)))
    assert keep == staged, "finished chunks are not done again"
    ingest(IngestConfig(source=str(source), out=str(tmp_path / "whole")))
    assert (out / MANIFEST).read_bytes() == (tmp_path / "whole" / MANIFEST).read_bytes()
    ids = read_rows(out)["sample_id"]
    assert len(ids) == len(ids.unique()) == 2500
