"""What the tests of ingest share: small settings, a run that leaves nothing behind, a crash."""

from __future__ import annotations

from pathlib import Path

from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import MANIFEST, verify_shards
from pipelines.ingest import ingest
from pipelines.ingestion.staging import STAGING


def settings(source: Path, out: Path, **changes: object) -> IngestConfig:
    base = {"shard_bytes": 65_536, "row_group_rows": 8}
    return IngestConfig(source=str(source), out=str(out), **{**base, **changes})  # type: ignore[arg-type]


def run_quietly(cfg: IngestConfig) -> bytes:
    ingest(cfg)
    verify_shards(cfg.out)
    names = {path.name for path in Path(cfg.out).iterdir()}
    assert STAGING not in names
    assert not [name for name in names if name.endswith(".tmp")]
    return Path(cfg.out, MANIFEST).read_bytes()


def run_backwards(function, rows, cfg, meter) -> None:  # type: ignore[no-untyped-def]
    """Stands in for Ray Data: one process, the last task first."""
    for row in reversed(rows):
        function(row, cfg)


class Crash(Exception):
    """Stands in for the kill of a process."""


def crash(*_: object, **__: object) -> None:
    raise Crash
