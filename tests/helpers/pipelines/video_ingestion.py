"""What the tests of video ingest share: a file's rows, losses and refusal, and damaged files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from helpers.models.video_files import number_of
from models.media.video.containers import VideoError
from models.media.videos import decode_frames
from pipelines.config.ingest import IngestConfig, VideoConfig
from pipelines.ingestion.preparing.videos import prepare_video
from pipelines.ingestion.reading.items import Item

VIDEO = VideoConfig(fps=10, segment_seconds=1, key_frame_every=4, crf=1)
CFG = IngestConfig(source="/x", out="/y", modality="video", video=VIDEO)


def prepare(
    path: Path, cfg: IngestConfig = CFG, **sidecars: np.ndarray
) -> tuple[list[dict], list[tuple[str, str]]]:
    """Returns the rows of a file and the losses; a refusal after the first row is a loss."""
    losses: list[tuple[str, str]] = []
    rows = []
    try:
        files = tuple((name, npy(values)) for name, values in sidecars.items())
        for row in prepare_video(Item(str(path), path=str(path), sidecars=files), cfg, losses):
            rows.append(row)
    except VideoError as error:
        if not rows:
            raise
        losses.append((error.reason, error.detail))
    return rows, losses


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def numbers(row: dict) -> list[int]:
    """Numbers of the frames that a segment shows."""
    return [number_of(frame) for frame in decode_frames(row["video"], range(row["num_frames"]))]


def refusal(path: Path, cfg: IngestConfig = CFG, **sidecars: np.ndarray) -> str:
    with pytest.raises(VideoError) as caught:
        prepare(path, cfg, **sidecars)
    assert caught.value.detail
    return caught.value.reason


def damage(path: Path, at: float, count: int = 60) -> Path:
    data = bytearray(path.read_bytes())
    start = int(len(data) * at)
    data[start : start + count] = bytes(count)
    path.write_bytes(data)
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path
