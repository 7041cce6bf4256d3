"""Shards of images, of videos and of a live stream that commit ae55864 wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from models.media.preprocessing import Preprocessing
from pipelines.config.data import ClipConfig
from pipelines.dataset.shards import QUARANTINE, read_manifest, read_rows, verify_shards
from pipelines.evaluation.features import decode_all
from pipelines.loading.clips import ClipSampler

SETS = ("live", "test", "train", "video")


@pytest.mark.parametrize("name", SETS)
def test_rows_and_manifest_are_what_the_old_code_read(
    name: str, old: Path, expected: dict[str, Any]
) -> None:
    folder, was = old / "shards" / name, expected["shards"][name]
    manifest = verify_shards(folder)
    assert manifest.manifest_hash == was["manifest_hash"]
    assert manifest.modality == was["modality"]
    assert list(manifest.classes) == was["classes"]
    assert manifest.num_frames == was["num_frames"]
    assert manifest.duplicates == was["duplicates"]
    rows = read_rows(folder).to_pylist()
    assert [row["sample_id"].hex() for row in rows] == was["sample_ids"]
    assert [row["label"] for row in rows] == was["labels"]
    assert ("recorded_at" in rows[0]) == (name == "live")
    if was["quarantine"]:
        assert pq.read_table(folder / QUARANTINE).to_pylist() == was["quarantine"]
        assert sum(manifest.quarantined.values()) == len(was["quarantine"])


@pytest.mark.parametrize("name", SETS)
def test_every_stored_image_and_clip_decodes(name: str, old: Path) -> None:
    rows = read_rows(old / "shards" / name)
    prep = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    video = "video" in rows.column_names
    sampler = ClipSampler(frames=4, settings=ClipConfig()) if video else None
    pixels = decode_all(rows, prep, sampler).pixels
    assert pixels.shape == (len(rows), 3, *((4,) if video else ()), 16, 16)
    assert pixels.flatten(1).float().std(1).min() > 1  # pictures, none of them blank


def test_another_version_of_the_manifest_is_refused(old: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(old / "shards" / "test", tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99, this code reads 1"):
        read_manifest(folder)


def test_a_shard_of_other_bytes_is_refused(old: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(old / "shards" / "test", tmp_path / "shards")
    shard = next(folder.glob("part-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="does not match its checksum"):
        verify_shards(folder)
