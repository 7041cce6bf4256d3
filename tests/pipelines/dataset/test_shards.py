"""The shard contract: order, determinism, limits, damage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.dataset.row_groups import read_row_group
from pipelines.dataset.shards import (
    IMAGE_SCHEMA,
    MANIFEST,
    Manifest,
    encode_table,
    hash_bytes,
    iter_samples,
    read_manifest,
    read_rows,
    sample_ids_array,
    verify_shards,
    write_manifest,
    write_shard,
)
from pipelines.runtime.uris import open_uri, write_atomic


def make_table(count: int, start: int = 0) -> pa.Table:
    images = [bytes([i % 256]) * (1 + i % 7) for i in range(start, start + count)]
    columns = [
        [hash_bytes(image + str(start + i).encode()) for i, image in enumerate(images)],
        images,
        [32] * count,
        [31] * count,
        [None if i % 3 == 0 else i % 10 for i in range(start, start + count)],
        [f"/raw/{i}.png" for i in range(start, start + count)],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, IMAGE_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=IMAGE_SCHEMA)


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Manifest]:
    """70 rows in two shards (40 and 30), row groups of 16."""
    fs, root = open_uri(tmp_path)
    parts = [
        write_shard(fs, root, make_table(40), 16),
        write_shard(fs, root, make_table(30, 40), 16),
    ]
    manifest = Manifest(
        classes=("a", "b"),
        num_samples=70,
        num_bytes=1,
        shards=tuple(parts),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        quarantined={"empty": 2},
        duplicates=1,
        ingest={"source": "x", "short_side": None},
        fingerprint="f",
    )
    write_manifest(tmp_path, manifest)
    return tmp_path, manifest


def test_manifest_round_trips(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    again = read_manifest(folder)
    assert again == manifest
    assert again.manifest_hash == manifest.manifest_hash
    assert again.row_groups() == [
        *((0, 0, 16), (0, 1, 16), (0, 2, 8)),
        *((1, 0, 16), (1, 1, 14)),
    ]
    assert again.row_group_array().tolist() == [list(group) for group in again.row_groups()]


def test_a_set_without_shards_has_no_row_groups(shards: tuple[Path, Manifest]) -> None:
    empty = dataclasses.replace(shards[1], shards=())
    assert empty.row_group_array().shape == (0, 3)


def test_manifest_text_and_hash_are_what_they_always_were(
    shards: tuple[Path, Manifest],
) -> None:
    """Both are made without copying every row group; `dataclasses.asdict` is what they were."""
    folder, manifest = shards
    values = dataclasses.asdict(manifest)
    assert json.loads((folder / MANIFEST).read_text()) == json.loads(json.dumps(values))
    content = {k: values[k] for k in ("schema_version", "modality", "classes", "shards")}
    text = json.dumps(content, sort_keys=True)
    assert manifest.manifest_hash == hash_bytes(text.encode()).hex()


def test_manifests_of_before_read(shards: tuple[Path, Manifest]) -> None:
    """What came later has a default: commit ae55864 wrote none of these."""
    folder, manifest = shards
    values = json.loads((folder / MANIFEST).read_text())
    del values["ignored"]
    (folder / MANIFEST).write_text(json.dumps(values))
    assert read_manifest(folder) == manifest


def test_row_groups_in_the_manifest_are_those_in_the_files(
    shards: tuple[Path, Manifest],
) -> None:
    folder, manifest = shards
    for shard in manifest.shards:
        footer = pq.ParquetFile(folder / shard.file).metadata
        groups = tuple(footer.row_group(g).num_rows for g in range(footer.num_row_groups))
        assert groups == shard.row_groups
        assert (folder / shard.file).stat().st_size == shard.bytes


def test_manifest_hash_follows_content_only(shards: tuple[Path, Manifest]) -> None:
    _, manifest = shards
    moved = dataclasses.replace(manifest, ingest={"source": "elsewhere"}, duplicates=9)
    assert moved.manifest_hash == manifest.manifest_hash
    reordered = dataclasses.replace(manifest, shards=manifest.shards[::-1])
    assert reordered.manifest_hash != manifest.manifest_hash


def test_rows_come_back_in_order(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    expected = pa.concat_tables([make_table(40), make_table(30, 40)])
    assert read_rows(folder).equals(expected)
    assert [table.num_rows for table in iter_samples(folder)] == [16, 16, 8, 16, 14]


@pytest.mark.parametrize("limit", [0, 1, 16, 17, 40, 41, 70, 1000])
def test_limit_cuts_anywhere(shards: tuple[Path, Manifest], limit: int) -> None:
    folder, _ = shards
    table = read_rows(folder, limit, ["label", "source_uri"])
    assert table.column_names == ["label", "source_uri"]
    assert table["source_uri"].to_pylist() == [f"/raw/{i}.png" for i in range(min(limit, 70))]


def test_one_row_group_is_read_alone(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    fs, root = open_uri(folder)
    table = read_row_group(fs, root, manifest.shards[1].file, 1, ["height", "image"])
    assert table.column_names == ["height", "image"]
    assert table["image"].to_pylist() == make_table(70)["image"].to_pylist()[56:]


def test_sample_ids_array_reads_slices(shards: tuple[Path, Manifest]) -> None:
    table = read_rows(shards[0]).slice(13, 50)
    ids = sample_ids_array(table)
    assert ids.shape == (50, 16)
    assert ids.dtype == np.uint8
    assert [bytes(row) for row in ids] == table["sample_id"].to_pylist()


def test_same_rows_make_the_same_file_however_they_are_chunked() -> None:
    whole = make_table(100)
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 33), whole.slice(34)])
    assert encode_table(whole, 16) == encode_table(pieces, 16)
    assert encode_table(whole, 16) != encode_table(whole.slice(0, 99), 16)


def test_no_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json: not ingested, or not finished"):
        read_manifest(tmp_path)


def test_damaged_manifest_is_refused(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    (folder / MANIFEST).write_text(manifest.to_json()[:100])
    with pytest.raises(ValueError, match="damaged"):
        read_manifest(folder)


def test_other_schema_version_is_refused(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    write_manifest(folder, dataclasses.replace(manifest, schema_version=99))
    with pytest.raises(ValueError, match="schema version 99"):
        read_manifest(folder)


def test_verify_finds_one_flipped_byte_and_a_missing_file(
    shards: tuple[Path, Manifest],
) -> None:
    folder, manifest = shards
    assert verify_shards(folder) == manifest
    path = folder / manifest.shards[1].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        verify_shards(folder)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        verify_shards(folder)


def test_write_atomic_leaves_no_temporary_file(tmp_path: Path) -> None:
    fs, root = open_uri(tmp_path / "new" / "folder")
    write_atomic(fs, f"{root}/file", b"one")
    write_atomic(fs, f"{root}/file", b"two")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["file"]
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"two"
