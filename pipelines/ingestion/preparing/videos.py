"""Turns one video file into the rows of its segments."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.media.video.containers import VideoError, declared_seconds, open_video
from models.media.video.video_reader import FrameReader, Loss, presentation_times
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import hash_bytes
from pipelines.ingestion.preparing.segments import Segment, Segmenter
from pipelines.ingestion.reading.items import Item

# Limits: they decide whether a file is taken, not what its segments hold.
_LIMITS = ("max_pixels", "max_bytes", "max_seconds")

F32 = npt.NDArray[np.float32]


def prepare_video(item: Item, cfg: IngestConfig, losses: list[Loss]) -> Iterator[dict[str, Any]]:
    """Decodes a video file once, in a stream, and yields a row for every segment of it.

    Args:
        item: with the path of a local file.
        cfg: the ingest configuration.
        losses: receives, at the end, what is missing of the video.

    Yields:
        The columns of `shards.VIDEO_SCHEMA` except `label` and `source_uri`, and `moments`.

    Raises:
        VideoError: the video is refused; or, after the first row, the rest of it.
    """
    sidecars = {name: _load_sidecar(name, data, cfg) for name, data in item.sidecars}
    with Path(item.path).open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        file.seek(0)
        times = _check_sidecars(sidecars, item.path, cfg) if sidecars else None
        with open_video(file, max_pixels=cfg.video.max_pixels) as (container, stream):
            seconds = declared_seconds(container, stream)
            if seconds is not None and seconds > cfg.video.max_seconds:
                limit = f"{cfg.video.max_seconds:g} s"
                raise VideoError("too_long", f"{float(seconds):.1f} s is over the limit of {limit}")
            reader = FrameReader(
                container,
                stream,
                max_seconds=cfg.video.max_seconds,
                max_pixels=cfg.video.max_pixels,
                max_gap=cfg.video.max_gap,
                times=times,
            )
            number = 0
            for number, segment in enumerate(_segments(reader, cfg), 1):
                yield segment_row(segment, segment_id(digest, number - 1, cfg), cfg, sidecars)
            losses += reader.losses
            if not number:
                raise VideoError(*_why_nothing(reader))


def _segments(reader: FrameReader, cfg: IngestConfig) -> Iterator[Segment]:
    segmenter = Segmenter(cfg.video, cfg.short_side)
    for frame in reader:
        yield from segmenter.push(frame)
    yield from segmenter.finish()


def _why_nothing(reader: FrameReader) -> Loss:
    losses = reader.losses
    return losses[0] if losses else ("no_frames", "the video stream holds no frame")


def segment_id(source: bytes, number: int, cfg: IngestConfig) -> bytes:
    """Returns a segment's sample id: a hash of the source's bytes, its number and the settings.

    Args:
        source: hash of the source file.
        number: of the segment in it.
        cfg: the ingest configuration.
    """
    values = dataclasses.asdict(cfg.video)
    settings = {name: value for name, value in values.items() if name not in _LIMITS}
    place = json.dumps([number, cfg.short_side, settings], sort_keys=True)
    return hash_bytes(source + place.encode())


def segment_row(
    segment: Segment, identity: bytes, cfg: IngestConfig, sidecars: Mapping[str, F32]
) -> dict[str, Any]:
    """Returns the columns of `shards.VIDEO_SCHEMA` except `label`, `source_uri`, and `moments`.

    Args:
        segment: the segment.
        identity: `segment_id`.
        cfg: the ingest configuration.
        sidecars: values of all frames of the source, [F, D], by column.
    """
    row: dict[str, Any] = {
        "sample_id": identity,
        "video": segment.video,
        "num_frames": segment.num_frames,
        "fps": cfg.video.fps,
        "start_s": segment.start_s,
        "height": segment.height,
        "width": segment.width,
        "moments": segment.moments,
    }
    # The value of a frame of the segment is that of the source frame it shows.
    return row | {name: v_FD[segment.source_frames].tolist() for name, v_FD in sidecars.items()}


def _load_sidecar(name: str, data: bytes, cfg: IngestConfig) -> F32:
    """Returns a sidecar as float32 [F, D], one row for each source frame.

    Raises:
        VideoError: `bad_sidecar`.
    """
    if len(data) > cfg.max_bytes:
        raise VideoError("bad_sidecar", f"{name}: over the limit of {cfg.max_bytes} bytes")
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise VideoError("bad_sidecar", f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise VideoError("bad_sidecar", f"{name}: not an array of numbers")
    if values.ndim not in (1, 2) or not values.size:
        raise VideoError("bad_sidecar", f"{name}: shape {values.shape}, not [frames, values]")
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        values_FD = values.reshape(len(values), -1).astype(np.float32)
    # What was done at the last frame led to none. A state may be unknown.
    if name == "actions" and not np.isfinite(values_FD[:-1]).all():
        raise VideoError("bad_sidecar", f"{name}: NaN or infinity, of which nothing can be learned")
    return values_FD


def _check_sidecars(sidecars: dict[str, F32], path: str, cfg: IngestConfig) -> list[int]:
    """Returns the times of the source's frames, having checked that each has its sidecar row.

    The header's count is accepted too: the file had that many frames before its end was lost.
    """
    with (
        Path(path).open("rb") as file,
        open_video(file, max_pixels=cfg.video.max_pixels) as (container, stream),
    ):
        times = presentation_times(container, stream)
        for name, values_FD in sidecars.items():
            if len(values_FD) < len(times) or len(values_FD) not in (len(times), stream.frames):
                detail = f"{name}: {len(values_FD)} rows for {len(times)} frames"
                raise VideoError("bad_sidecar", detail)
    return times
