"""What the tests of sources share: small configurations, archives, and reading without Ray."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

from PIL import Image

from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.chunks import chunk_from_json, chunk_to_json
from pipelines.ingestion.reading.items import Item, Tally
from pipelines.ingestion.sources.registry import list_source, read_chunk


def config(source: object, **changes: object) -> IngestConfig:
    return IngestConfig(source=str(source), out="/nowhere/out", **changes)  # type: ignore[arg-type]


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def picture(value: int, kind: str = "PNG") -> bytes:
    """A tiny picture, another one for every value below 2**24."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value & 255, value >> 8 & 255, value >> 16)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_source(cfg: IngestConfig) -> tuple[list[Item], Tally]:
    """Reads everything as ingest's tasks do; the items with the labels that came after them."""
    items: list[Item] = []
    total = Tally()
    for chunk in list_source(cfg).chunks:
        assert chunk_from_json(chunk_to_json(chunk)) == chunk
        tally = Tally()
        found = list(read_chunk(chunk, cfg, tally))
        for number, (label, problem) in tally.labels.items():
            found[number] = dataclasses.replace(found[number], label=label, label_problem=problem)
        items += found
        total.ignored += tally.ignored
        total.notes += tally.notes
    return items, total


def items_of(cfg: IngestConfig) -> list[Item]:
    return read_source(cfg)[0]


def labels_by_name(items: list[Item]) -> dict[str, object]:
    """Labels by what stands behind the last "/" or "#" of the address."""
    return {item.uri.replace("#", "/").rpartition("/")[2]: item.label for item in items}
