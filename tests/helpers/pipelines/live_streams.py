"""What the tests of live ingest share: a short film, settings, what was published, a follower."""

from __future__ import annotations

import dataclasses
import io
import threading
from pathlib import Path
from typing import Any

import av

from helpers.models.video_files import CYCLE, number_of
from helpers.waiting import wait_until
from models.media.videos import decode_frames
from pipelines.config.ingest import IngestConfig, LiveConfig, VideoConfig
from pipelines.dataset.shards import list_names, read_manifest, read_rows
from pipelines.ingestion.live import follow

VIDEO = VideoConfig(fps=10, segment_seconds=1, key_frame_every=4, crf=1)
LIVE = LiveConfig(publish_seconds=1e-3, backoff_seconds=0.01, most_backoff_seconds=0.02)
FRAMES = 132  # at 30 a second
WHOLE = [n % CYCLE for n in range(0, FRAMES, 3)]
COMPLETE = 40  # of `WHOLE`, in segments that are whole while more may come
LONG_S = 60.0  # nothing here takes so long; a test that hangs ends then


def config(source: Any, out: Path, **changes: Any) -> IngestConfig:
    cfg = IngestConfig(source=str(source), out=str(out), follow=True, video=VIDEO, live=LIVE)
    return dataclasses.replace(cfg, **changes)


def numbers(out: Path | str) -> list[int]:
    """Numbers, modulo `CYCLE`, of all published frames, in order."""
    rows = read_rows(out).to_pylist()
    decoded = [decode_frames(row["video"], range(row["num_frames"])) for row in rows]
    return [number_of(frame) for frames in decoded for frame in frames]


def ids(out: Path | str) -> list[bytes]:
    return read_rows(out, columns=["sample_id"])["sample_id"].to_pylist()


def uris(out: Path) -> str:
    return " ".join(read_rows(out, columns=["source_uri"])["source_uri"].to_pylist())


def frames_in(out: Path | str) -> int:
    return (read_manifest(out).num_frames or 0) if "manifest.json" in list_names(out) else 0


def follow_until(cfg: IngestConfig, frames: int) -> None:
    """Follows until that many frames are published, which must be within whole segments."""
    with Following(cfg) as running:
        wait_until(lambda: running.error is not None or frames_in(cfg.out) >= frames)


def check_numbers(out: Path | str) -> None:
    """Checks that frames start at the film's beginning, without gaps or repeats.

    The film's end may be missing still.
    """
    shown = numbers(out)
    assert len(shown) >= COMPLETE
    assert shown == WHOLE[: len(shown)]


class Following:
    """`follow` in a thread."""

    def __init__(self, cfg: IngestConfig) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._cfg = cfg
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            follow(self._cfg, self.stop)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Following:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


def first_key_frame(transport: bytes, cut: int) -> int:
    """Number of the first key frame behind a byte."""
    with av.open(io.BytesIO(transport)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        start, base = min(p.pts for p in packets), packets[0].time_base
        key = next(p for p in packets if p.is_keyframe and p.pos >= cut)
        return round((key.pts - start) * base * 30)
