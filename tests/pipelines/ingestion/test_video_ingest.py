"""Video ingest: every file is kept, a duplicate or in quarantine, also after a crash."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.models.video_files import CYCLE, write_sound, write_video
from helpers.pipelines.ingestion import Crash, crash, run_backwards, run_quietly
from helpers.pipelines.video_ingestion import VIDEO, cut, numbers
from pipelines import ingest as ingest_module
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import LOSSES, read_manifest, read_rows
from pipelines.ingest import ingest
from pipelines.ingestion.staging import STAGING


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good files of three classes, two duplicates, sidecars, one loss, five refusals."""
    root = tmp_path_factory.mktemp("footage")
    for index in range(12):
        folder = root / f"class{index % 3}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{index:02d}.{('mp4', 'mkv', 'mov', 'avi')[index % 4]}"
        write_video(path, 20 + 3 * index)
        if index % 2:
            np.save(path.with_suffix(".actions.npy"), np.arange(20 + 3 * index))
    (root / "class0" / "again.mp4").write_bytes((root / "class0" / "00.mp4").read_bytes())
    (root / "class1" / "again.avi").write_bytes((root / "class0" / "03.avi").read_bytes())
    cut(write_video(root / "cut.mkv", 90), 0.6)
    write_sound(root / "sound.mp4")
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.webm").write_text("not found")
    (root / "lost.mp4").symlink_to("/nonexistent/video")
    with (root / "large.mp4").open("wb") as file:
        file.truncate(10_000_001)  # sparse
    (root / "notes.txt").write_text("ignored")
    return root


def settings(source: Path, out: Path, **changes: object) -> IngestConfig:
    video = dataclasses.replace(VIDEO, max_bytes=10_000_000)
    base = {"video": video, "shard_bytes": 20_000, "row_group_rows": 4}
    return IngestConfig(source=str(source), out=str(out), **{**base, **changes})  # type: ignore[arg-type]


REASONS = {
    **{"empty": 1, "no_video": 1, "not_a_video": 1},
    **{"too_many_bytes": 1, "unreadable": 1},
}


def test_every_file_is_kept_a_duplicate_or_in_quarantine(
    footage: Path, in_process: None, tmp_path: Path
) -> None:
    run_quietly(settings(footage, tmp_path / "out"))
    manifest, rows = read_manifest(tmp_path / "out"), read_rows(tmp_path / "out").to_pylist()
    assert manifest.modality == "video"
    assert manifest.quarantined == REASONS
    assert manifest.duplicates == 2
    assert manifest.losses == {"truncated": 1}
    assert manifest.classes == ("class0", "class1", "class2")
    assert len(manifest.shards) > 1
    assert manifest.num_samples == len(rows) == len({row["sample_id"] for row in rows})
    assert manifest.num_frames == sum(row["num_frames"] for row in rows)
    assert manifest.num_bytes == sum(len(row["video"]) for row in rows)
    names = {Path(row["source_uri"]).name for row in rows}
    assert len(names) == 13
    losses = pq.read_table(tmp_path / "out" / LOSSES).to_pylist()
    assert [Path(row["source_uri"]).name for row in losses] == ["cut.mkv"]
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {(Path(row["source_uri"]).stem, row["reason"]) for row in quarantine} == {
        *(("empty", "empty"), ("sound", "no_video"), ("text", "not_a_video")),
        *(("large", "too_many_bytes"), ("lost", "unreadable")),
    }


def test_rows_say_what_they_hold(footage: Path, in_process: None, tmp_path: Path) -> None:
    run_quietly(settings(footage, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    for row in read_rows(tmp_path / "out").to_pylist():
        path = Path(row["source_uri"])
        found = numbers(row)
        start = round(row["start_s"] * 30)
        assert found == [(start + 3 * n) % CYCLE for n in range(row["num_frames"])]
        label = manifest.classes.index(path.parent.name) if path.parent != footage else None
        if "again" not in path.name and path.stem not in ("00", "03"):
            assert row["label"] == label
        sidecar = path.with_suffix(".actions.npy")
        expected = [[start + 3 * n] for n in range(row["num_frames"])]
        assert row["actions"] == (expected if sidecar.exists() else None)
        assert row["states"] is None


def test_the_summary_says_what_a_square_crop_would_not_show(
    footage: Path, in_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quietly(settings(footage, tmp_path / "out"))
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("note: ")]
    assert "25% of a picture 64 wide and 48 high (4:3)" in line
    assert "64x48 (4:3)" in text


@pytest.mark.parametrize("where", ["stage_chunk", "merge_shard", "write_manifest", "_clean_up"])
def test_crash_then_again_gives_the_same_bytes(
    where: str,
    footage: Path,
    in_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.ingestion.listing.chunking.VIDEO_CHUNK_ITEMS", 4)
    expected = run_quietly(settings(footage, tmp_path / "whole"))
    cfg = settings(footage, tmp_path / "out")
    with monkeypatch.context() as patch:
        function, calls = getattr(ingest_module, where), []

        def third(row: dict, cfg: IngestConfig) -> dict:
            calls.append(row)
            if len(calls) == 3:
                raise Crash
            return function(row, cfg)  # type: ignore[no-any-return]

        patch.setattr(ingest_module, where, third if where.endswith(("chunk", "shard")) else crash)
        with pytest.raises(Crash):
            ingest(cfg)
    assert any((tmp_path / "out" / STAGING).iterdir())
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / STAGING).glob("*.items.*")}
    assert done
    assert run_quietly(cfg) == expected
    for shard in read_manifest(cfg.out).shards:
        whole = (tmp_path / "whole" / shard.file).read_bytes()
        assert (tmp_path / "out" / shard.file).read_bytes() == whole


@pytest.mark.ray
def test_ray_tasks_give_the_same_bytes_and_done_is_done(
    footage: Path, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ingestion.listing.chunking.VIDEO_CHUNK_ITEMS", 4)
    first = run_quietly(settings(footage, tmp_path / "ray"))
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()}
    assert run_quietly(settings(footage, tmp_path / "ray")) == first
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()} == stamps
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "_run", run_backwards)
        assert run_quietly(settings(footage, tmp_path / "here")) == first


def test_changed_sidecar_is_ingested_again(in_process: None, tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    write_video(source / "a.mp4", 20)
    cfg = settings(source, tmp_path / "out")
    run_quietly(cfg)
    assert read_rows(cfg.out)["states"].to_pylist()[0] is None
    np.save(source / "a.states.npy", np.arange(20))
    run_quietly(cfg)
    assert read_rows(cfg.out)["states"].to_pylist()[0] == [[n] for n in range(0, 20, 3)]
    cut(source / "a.mp4", 0.5)
    with pytest.raises(ValueError, match=r"not one good video among 1: \{'truncated': 1"):
        ingest(cfg)
