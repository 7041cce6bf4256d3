"""A data set that grows while it is read: shard by shard, each made visible by one atomic manifest.

The shard is written first, then the manifest that names it. A kill between the two leaves a shard
that no manifest names, which the next start removes. So readers only see complete data sets, each
the beginning of the next, and a segment is in a set once or not at all.

Shards are `part-<run><number>.parquet`, 8 hex digits each: the run (seconds since 1970 of its
start) and the shard's number in the set. Their order is that of their names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import (
    LIVE_SCHEMA,
    MANIFEST,
    SHARD_NAME,
    Manifest,
    Shard,
    hash_bytes,
    list_names,
    read_manifest,
    remove_unnamed,
    write_manifest,
    write_shard,
)
from pipelines.runtime.uris import is_local, open_uri, public_name, write_atomic

MARK = ".live"
"""A file that marks the folder of a live set; locally it is also the lock of the publisher."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """How much of a source has been recorded, by its own clock, for sources that can be read again.

    Attributes:
        identity: what can be read again: a file, or a playlist's address; "" if nothing can.
        origin: its first frame's time, seconds.
        end: up to where it is in segments, seconds.
        jumps: how often the clock went back before that (a file to which two recordings were
            written).
    """

    identity: str
    origin: Fraction = Fraction(0)
    end: Fraction = Fraction(0)
    jumps: int = 0

    @property
    def begun(self) -> bool:
        """Whether any segment of the source has been recorded."""
        return self.end > self.origin or self.jumps > 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of the recording, stored as `live` in the manifest.

    Attributes:
        open: somebody is publishing; also true after a kill.
        run: of the process, seconds since 1970.
        seconds: of all segments.
        moments: sums over all segments (`preparing.pixel_moments`).
        timeline: of the last segment's source.
    """

    open: bool
    run: int
    seconds: float = 0.0
    moments: tuple[float, ...] = (0.0,) * 6
    timeline: Timeline | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; fractions are text."""
        values = dataclasses.asdict(self)
        if self.timeline is not None:
            values["timeline"] |= {
                "origin": str(self.timeline.origin),
                "end": str(self.timeline.end),
            }
        return values | {"moments": list(self.moments)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Progress:
        """Reads `to_json`'s values."""
        line = values["timeline"]
        if line is not None:
            fractions = {"origin": Fraction(line["origin"]), "end": Fraction(line["end"])}
            line = Timeline(**{**line, **fractions})
        return Progress(**{**values, "moments": tuple(values["moments"]), "timeline": line})


class LiveSet:
    """A data set that this process alone publishes to; a context manager.

    Args:
        cfg: the ingest configuration; `cfg.out` is new, or a set like this one with its settings.

    Attributes:
        manifest: the last one published; None before the first.
        run: this process's number, greater than that of every run before it.

    Raises:
        ValueError: `cfg.out` holds something else, or somebody else publishes to it.
    """

    def __init__(self, cfg: IngestConfig) -> None:
        self._cfg, self._settings = cfg, _settings(cfg)
        self._stack = contextlib.ExitStack()
        self.manifest = _read_set(cfg, self._settings)
        fs, root = open_uri(cfg.out)
        if is_local(fs):
            _lock(self._stack, Path(root) / MARK, cfg.out)
            self.manifest = _read_set(cfg, self._settings)  # of whoever had the lock until now
        else:
            write_atomic(fs, f"{root}/{MARK}", b"")
        remove_unnamed(cfg.out, self.manifest.shards if self.manifest else ())
        self.progress = Progress(open=True, run=int(time.time()))
        if self.manifest is not None:
            last = Progress.from_json(self.manifest.live or {})
            run = max(self.progress.run, last.run + 1)
            self.progress = dataclasses.replace(last, open=True, run=run)
            self._write(dataclasses.replace(self.manifest, live=self.progress.to_json()))
        self.run = self.progress.run

    def __enter__(self) -> LiveSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Marks the set as closed, unless an error ends the block, and releases the lock."""
        with self._stack:
            if kind is None and self.manifest is not None:
                self.progress = dataclasses.replace(self.progress, open=False)
                self._write(dataclasses.replace(self.manifest, live=self.progress.to_json()))

    def publish(
        self, rows: Sequence[dict[str, Any]], timeline: Timeline, losses: Mapping[str, int]
    ) -> Manifest:
        """Adds one shard, then the manifest that names it.

        Args:
            rows: at least one, of `LIVE_SCHEMA`, with `moments`.
            timeline: where the last of them ends.
            losses: what was lost since the last call, by reason.

        Raises:
            ValueError: somebody else has published here.
        """
        fs, root = open_uri(self._cfg.out)
        number = len(self.manifest.shards) if self.manifest else 0
        name = f"{self.run:08x}{number:08x}"
        table = pa.Table.from_pylist(list(rows), LIVE_SCHEMA)
        shard = write_shard(fs, root, table, self._cfg.row_group_rows, name)
        old = self.progress.moments
        sums = np.sum([old, *(row["moments"] for row in rows)], axis=0).tolist()
        self.progress = dataclasses.replace(
            self.progress,
            seconds=self.progress.seconds + sum(row["num_frames"] / row["fps"] for row in rows),
            moments=tuple(sums),
            timeline=timeline,
        )
        return self._write(self._grown(shard, rows, losses))

    def _grown(
        self, shard: Shard, rows: Sequence[dict[str, Any]], losses: Mapping[str, int]
    ) -> Manifest:
        old = self.manifest
        count = (old.num_samples if old else 0) + len(rows)
        lost = dict(old.losses if old else {})
        for reason, times in losses.items():
            lost[reason] = lost.get(reason, 0) + times
        mean_std = [value / count for value in self.progress.moments]
        stds = [math.sqrt(max(mean_std[c + 3] - mean_std[c] ** 2, 0.0)) for c in range(3)]
        return Manifest(
            modality="video",
            num_samples=count,
            num_bytes=(old.num_bytes if old else 0) + sum(len(row["video"]) for row in rows),
            num_frames=((old.num_frames or 0) if old else 0) + sum(r["num_frames"] for r in rows),
            shards=(*(old.shards if old else ()), shard),
            mean=tuple(round(value, 6) for value in mean_std[:3]),  # type: ignore[arg-type]
            std=tuple(round(value, 6) for value in stds),  # type: ignore[arg-type]
            quarantined={},
            duplicates=0,
            losses=lost,
            ingest=self._settings,
            fingerprint=hash_bytes(json.dumps(self._settings, sort_keys=True).encode()).hex(),
            live=self.progress.to_json(),
        )

    def _write(self, manifest: Manifest) -> Manifest:
        """Replaces the manifest.

        Raises:
            ValueError: Another process has replaced it since.
        """
        if _read(self._cfg.out) != self.manifest:
            raise ValueError(f"--out: somebody else publishes to {self._cfg.out}")
        write_manifest(self._cfg.out, manifest)
        self.manifest = manifest
        return manifest


def _settings(cfg: IngestConfig) -> dict[str, Any]:
    """Returns the configuration as JSON values for the manifest, without secrets in addresses."""
    values = json.loads(json.dumps(dataclasses.asdict(cfg)))
    settings = {k: v for k, v in values.items() if k not in ("out", "live")}
    return settings | {"source": public_name(cfg.source), "modality": "video"}


def _read(out: str) -> Manifest | None:
    return read_manifest(out) if MANIFEST in list_names(out) else None


def _read_set(cfg: IngestConfig, settings: dict[str, Any]) -> Manifest | None:
    """Returns the manifest at `cfg.out`, None of a set without a shard so far.

    Raises:
        ValueError: something else is there, or a set with segments of another kind.
    """
    manifest = _read(cfg.out)
    if manifest is None:
        names = list_names(cfg.out)
        foreign = sorted(n for n in names if n and not n.startswith(".") and n != MANIFEST)
        ours = MARK in names and all(SHARD_NAME.fullmatch(name) for name in foreign)
        if foreign and not ours:
            shown = ", ".join(foreign[:3])
            raise ValueError(f"--out: {cfg.out} holds something else ({shown})")
        return None
    if manifest.live is None:
        raise ValueError(f"--out: {cfg.out} is a data set of files; a live stream needs its own")
    for name in ("short_side", "video"):
        if manifest.ingest[name] != settings[name]:
            flag = name.replace("_", "-")
            was = f"{manifest.ingest[name]}, now {settings[name]}"
            raise ValueError(f"--{flag}: the segments at {cfg.out} were made with {was}")
    return manifest


def _lock(stack: contextlib.ExitStack, path: Path, out: str) -> None:
    """Takes a lock that the operating system releases when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(path.open("ab"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"--out: somebody else publishes to {out}") from error
