"""Row groups on S3: what is fetched for them, counted by a proxy, and what damage says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.s3_proxy import S3Proxy, proxied
from pipelines.dataset import row_groups
from pipelines.dataset.row_groups import read_footer, read_row_group
from pipelines.dataset.shards import IMAGE_SCHEMA, Shard, write_shard
from pipelines.runtime.uris import open_uri

ROWS, GROUP_ROWS, IMAGE_BYTES = 256, 8, 20_000
URI = "s3://row-groups/shards"


@dataclass(frozen=True)
class Stored:
    proxy: S3Proxy
    shard: Shard
    table: pa.Table

    def fetched(self, index: int, columns: list[str] | None = None) -> tuple[pa.Table, int]:
        """Reads a row group whose footer is known, and returns it and the bytes that S3 sent."""
        fs, root = open_uri(URI)
        read_row_group(fs, root, self.shard.file, 0, ["label"])
        self.proxy.reset()
        table = read_row_group(fs, root, self.shard.file, index, columns)
        return table, self.proxy.bytes_out

    def stored_bytes(self, index: int, columns: list[str]) -> int:
        fs, root = open_uri(URI)
        footer = pq.read_metadata(pa.BufferReader(fs.cat_file(f"{root}/{self.shard.file}")))
        group = footer.row_group(index)
        chunks = [group.column(c) for c in range(group.num_columns)]
        return sum(c.total_compressed_size for c in chunks if c.path_in_schema in columns)


@pytest.fixture(scope="module")
def stored(s3: dict[str, str]) -> Iterator[Stored]:
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "sample_id": [random.bytes(16) for _ in range(ROWS)],
            "image": [random.bytes(IMAGE_BYTES) for _ in range(ROWS)],
            "height": [32] * ROWS,
            "width": [32] * ROWS,
            "label": random.integers(0, 1000, ROWS),
            "source_uri": [f"s3://raw/{random.integers(1 << 40)}.png" for _ in range(ROWS)],
        }
    ).cast(IMAGE_SCHEMA)
    with proxied(s3) as proxy:
        fs, root = open_uri(URI)
        fs.mkdir("row-groups")
        shard = write_shard(fs, root, table, GROUP_ROWS)
        yield Stored(proxy, shard, table)


def test_a_row_group_costs_its_own_bytes_and_one_request(stored: Stored) -> None:
    table, fetched = stored.fetched(5)
    assert (stored.proxy.count("GET"), stored.proxy.count("HEAD")) == (1, 0)
    assert table.equals(stored.table.slice(5 * GROUP_ROWS, GROUP_ROWS))
    assert fetched <= 1.2 * stored.stored_bytes(5, IMAGE_SCHEMA.names)


def test_a_column_costs_its_own_bytes(stored: Stored) -> None:
    table, fetched = stored.fetched(31, ["label"])
    assert table.equals(stored.table.select(["label"]).slice(31 * GROUP_ROWS, GROUP_ROWS))
    assert 0 < fetched <= 1.2 * stored.stored_bytes(31, ["label"])


def test_a_reader_that_reads_ahead_is_caught(stored: Stored) -> None:
    fs, root = open_uri(URI)
    stored.proxy.reset()
    with fs.open(f"{root}/{stored.shard.file}", "rb") as file:
        pq.ParquetFile(file).read_row_group(5)
    assert stored.proxy.bytes_out > 1.2 * stored.stored_bytes(5, IMAGE_SCHEMA.names)


def test_footers_cost_their_own_bytes_and_soon_one_request(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "_footer_bytes", {})
    fs, root = open_uri(URI)
    path = f"{root}/{stored.shard.file}"
    length = pq.read_metadata(pa.BufferReader(fs.cat_file(path))).serialized_size + 8
    requests = []
    for _ in range(2):
        stored.proxy.reset()
        assert read_footer(fs, path).num_rows == ROWS
        assert length <= stored.proxy.bytes_out <= 1.1 * length
        requests.append(stored.proxy.count("GET") + stored.proxy.count("HEAD"))
    assert requests == [2, 1]


@pytest.mark.parametrize("damage", ["cut", "footer", "page"])
def test_a_damaged_shard_is_named_by_its_uri(stored: Stored, damage: str) -> None:
    fs, root = open_uri(URI)
    data = bytearray(fs.cat_file(f"{root}/{stored.shard.file}"))
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "footer":
        data[-1000:-900] = b"\xff" * 100
    else:
        data[4:60] = b"\xff" * 56
    file = f"part-{damage}.parquet"
    fs.pipe_file(f"{root}/{file}", bytes(data))
    with pytest.raises(ValueError, match="is damaged") as caught:
        read_row_group(fs, root, file, 0)
    assert str(caught.value).startswith(f"{URI}/{file}: ")
    assert str(caught.value).count("\n") <= 1
