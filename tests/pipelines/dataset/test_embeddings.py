"""How the row groups of a data set are divided into files of embeddings."""

from __future__ import annotations

import pytest

from pipelines.dataset.embeddings import plan_parts
from pipelines.dataset.shards import Manifest, Shard


def _manifest(groups: list[tuple[int, ...]]) -> Manifest:
    shards = tuple(
        Shard(file=f"part-{i}.parquet", rows=sum(g), bytes=1, blake2b="", row_groups=g)
        for i, g in enumerate(groups)
    )
    zero = (0.0, 0.0, 0.0)
    rows = sum(shard.rows for shard in shards)
    return Manifest(
        num_samples=rows,
        num_bytes=1,
        shards=shards,
        mean=zero,
        std=zero,
        quarantined={},
        duplicates=0,
        ingest={},
        fingerprint="",
    )


@pytest.mark.parametrize("shape", [[48], [256, 1280]])
def test_parts_cover_every_row_group_once(shape: list[int]) -> None:
    manifest = _manifest([(1000, 1000, 7), (1000,), (3000, 12)])
    parts = plan_parts(manifest, {"key": "k", "shape": shape})
    groups = [group for part in parts for group in part.groups]
    expected = [(manifest.shards[s].file, g) for s, g, _ in manifest.row_groups()]
    assert groups == expected
    assert sum(part.rows for part in parts) == manifest.num_samples
    assert len({part.file for part in parts}) == len(parts)


def test_files_stay_small_when_an_embedding_is_large() -> None:
    manifest = _manifest([(64,) * 40])
    small = plan_parts(manifest, {"key": "k", "shape": [48]})
    large = plan_parts(manifest, {"key": "k", "shape": [256, 1280]})
    assert max(part.rows for part in small) == 1024
    # A row group is the least a file can hold; two would be within 256 MiB, four would not.
    assert max(part.rows for part in large) == 192
