"""Helpers for tests of the loader: shards with pictures of every kind, batches of all workers."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from models.media.images import decode_image
from pipelines.config.data import DataConfig, MaskConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.dataset.shards import (
    IMAGE_SCHEMA,
    Manifest,
    hash_bytes,
    write_manifest,
    write_shard,
)
from pipelines.loading.loader import train_batches
from pipelines.runtime.uris import open_uri

ROWS = 150


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A smooth picture with structure at several scales, different for every seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def variants() -> list[bytes]:
    """One picture of every kind that ingest may store, and some that it would have re-encoded."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees when shown
    return [
        encode(picture(1, 40, 30), "PNG"),
        encode(picture(2, 40, 30), "JPEG", quality=95),
        encode(picture(3, 40, 30).convert("L"), "PNG"),
        encode(picture(4, 40, 30).convert("L"), "JPEG", quality=95),
        encode(picture(5, 40, 30).convert("CMYK"), "JPEG", quality=95),
        encode(picture(6, 40, 30), "JPEG", quality=95, exif=exif),
        encode(picture(7, 40, 30), "WEBP", lossless=True),
        encode(picture(8, 40, 30).convert("RGBA"), "PNG"),
        encode(picture(9, 40, 30).convert("P"), "PNG"),
        encode(picture(10, 600, 400), "JPEG", quality=95),  # decoded at reduced scale
        encode(picture(11, 9, 120), "PNG"),  # no crop of an allowed ratio fits by chance
        encode(picture(12, 32, 32), "PNG"),
    ]


def row_of(data: bytes, name: str, label: int | None = None) -> dict:
    image = decode_image(data)
    return {
        "sample_id": hash_bytes(data),
        "image": data,
        "height": image.height,
        "width": image.width,
        "label": label,
        "source_uri": name,
    }


def write_rows(folder: Path, rows: list[dict]) -> str:
    return write_shards(folder, pa.Table.from_pylist(rows, IMAGE_SCHEMA), 70, 16)


def write_shards(
    folder: Path, table: pa.Table, shard_rows: int, group_rows: int, **manifest_fields
) -> str:
    """Writes shards of images or segments with a manifest, as ingest does; returns their folder."""
    fs, root = open_uri(folder)
    parts = [table.slice(first, shard_rows) for first in range(0, len(table), shard_rows)]
    (payload,) = {"image", "video"} & set(table.column_names)
    manifest = Manifest(
        num_samples=len(table),
        num_bytes=sum(len(data.as_py()) for data in table[payload]),
        shards=tuple(write_shard(fs, root, part, group_rows) for part in parts),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        quarantined={},
        duplicates=0,
        ingest={},
        fingerprint="made by a test",
        **manifest_fields,
    )
    write_manifest(folder, manifest)
    return str(folder)


def write_samples(folder: Path) -> str:
    """Writes shards of `ROWS` images: one of every kind, and plain ones with labels."""
    rows = [row_of(data, f"kind-{i}") for i, data in enumerate(variants())]
    for i in range(len(rows), ROWS):
        rows.append(row_of(encode(picture(100 + i, 20, 24), "PNG"), f"plain-{i}", i % 10))
    return write_rows(folder, rows)


def config(data: str, mask: MaskConfig | None = None, **fields) -> PretrainConfig:
    settings = {"batch_size": 32, "lanes": 8, "shuffle_window": 9, "flip": True, **fields}
    return PretrainConfig(
        data=DataConfig(train=data, **settings),
        mask=mask or MaskConfig(),
        model=ModelConfig(image_size=32, patch_size=4),
    )


def global_batches(cfg: PretrainConfig, world_size: int, start: int, end: int) -> list[dict]:
    ranks = [
        train_batches(cfg, rank=rank, world_size=world_size, start_step=start, end_step=end)
        for rank in range(world_size)
    ]
    return [join(parts) for parts in zip(*ranks, strict=True)]


def join(parts: tuple[dict, ...]) -> dict:
    joined = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(first, torch.Tensor):
            joined[key] = torch.cat(values)
        elif isinstance(first, np.ndarray):
            joined[key] = np.concatenate(values)
        else:
            joined[key] = list(itertools.chain(*values)) if isinstance(first, list) else first
    return joined


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            same = a[key] == b[key]
            assert np.all(np.asarray(same)), (key, a["step"])
