"""Listing and reading Parquet files, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_helpers import config, items_of, write

from pipelines.ingestion.items import Item
from pipelines.readers import read_chunk
from pipelines.sources import Listing, list_source


def test_parquet_bytes_and_hugging_face_structs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"0", None], "label": [3, -1]}), tmp_path / "a.parquet")
    struct = [{"bytes": b"2", "path": "x"}, {"bytes": None, "path": "y"}]
    pq.write_table(pa.table({"image": struct, "label": ["dog", None]}), tmp_path / "b.parquet")
    items = items_of(config(tmp_path))
    uris = [f"{tmp_path}/{n}.parquet#row={r}" for n in "ab" for r in (0, 1)]
    reason = "missing_image"
    assert items == [
        Item(uris[0], b"0", 3),
        Item(uris[1], problem=(reason, "the row has no image bytes")),
        Item(uris[2], b"2", "dog"),
        Item(uris[3], problem=(reason, "nothing at 'y'")),
    ]


def test_parquet_of_many_row_groups_keeps_row_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sources.CHUNK_BYTES", 1)
    table = pa.table({"jpg": [str(i).encode() for i in range(300)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    cfg = config(tmp_path, image_column="jpg")
    assert len(list_source(cfg).chunks) == 3
    items = items_of(cfg)
    assert [item.data for item in items] == table["jpg"].to_pylist()
    assert [item.uri.rpartition("=")[2] for item in items] == [str(i) for i in range(300)]
    assert {item.label for item in items} == {None}


def test_declared_class_names_are_taken(tmp_path: Path) -> None:
    feature = {"names": ["zebra", "ant"], "_type": "ClassLabel"}
    meta = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    table = pa.table({"image": [b"0"], "label": [1]}).replace_schema_metadata(meta)
    pq.write_table(table, tmp_path / "a.parquet")
    listing: Listing = list_source(config(tmp_path))
    assert listing.classes == ("zebra", "ant")


def test_parquet_without_the_column_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b"0"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"--image-column: .*a\.parquet has only .*'picture'"):
        list_source(config(tmp_path))


def test_parquet_that_is_none_or_is_damaged_loses_no_row(tmp_path: Path) -> None:
    good = tmp_path / "good.parquet"
    pq.write_table(
        pa.table({"image": [bytes([i]) * 5000 for i in range(200)]}),
        good,
        row_group_size=100,
        compression="ZSTD",
        use_dictionary=False,
    )
    column = pq.ParquetFile(good).metadata.row_group(1).column(0)
    data = bytearray(good.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 40] = bytes(40)
    good.write_bytes(data)
    write(tmp_path / "none.parquet", b"no parquet")
    items = items_of(config(tmp_path))
    assert [item.problem is None for item in items] == [True] * 100 + [False] * 101
    assert {item.problem[0] for item in items if item.problem} == {"corrupt_archive"}


def test_parquet_that_vanishes_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"0"] * 5}), path, row_group_size=2)
    cfg = config(tmp_path)
    (chunk,) = list_source(cfg).chunks
    path.unlink()
    items = list(read_chunk(chunk, cfg))
    assert [item.problem and item.problem[0] for item in items] == ["unreadable"] * 5
