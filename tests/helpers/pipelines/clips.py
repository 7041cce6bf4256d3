"""Video shards of synthetic segments whose frames encode their own numbers."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa

from helpers.models.video_files import write_video
from helpers.pipelines.loading import write_shards
from pipelines.dataset.shards import (
    VIDEO_SCHEMA,
    hash_bytes,
)

ROWS = 40


LENGTHS = (30, 30, 12, 5)  # frames of the segments, by turns


FPS = 10.0


def segment(number: int) -> dict:
    """A row of a video whose first frame has this number."""
    buffer, frames = io.BytesIO(), LENGTHS[number % len(LENGTHS)]
    write_video(buffer, frames, rate=10, container="mp4")
    return {
        "sample_id": hash_bytes(b"%d" % number),
        "video": buffer.getvalue(),
        "num_frames": frames,
        "fps": FPS,
        "start_s": 0.0,
        "height": 48,
        "width": 64,
        "label": number % 3,
        "source_uri": f"clip-{number}",
        "actions": None,
        "states": None,
    }


def write_rows(folder: Path, rows: list[dict], classes: tuple[str, ...] = ("a", "b", "c")) -> str:
    return write_shards(
        folder,
        pa.Table.from_pylist(rows, VIDEO_SCHEMA),
        len(rows),
        5,
        modality="video",
        classes=classes,
        num_frames=sum(row["num_frames"] for row in rows),
    )
