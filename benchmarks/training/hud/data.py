"""Footage as the probes read it: ingested sets, decoded clips, labels, and repeated frames.

Shape suffixes: N clips, C channels, F frames of a clip, H and W pixels, V values of a frame's
state.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from models.media.preprocessing import Preprocessing
from pipelines.dataset.shards import read_manifest, read_row_group
from pipelines.evaluation.features import load_clip, preprocessing_of
from pipelines.evaluation.near_duplicates import find_near_duplicates
from pipelines.runtime.uris import open_uri

from .jobs import command, once
from .settings import NEW, OLD, OTHER_GAME, Settings, Task, model

FRAMES, FPS, SEGMENT_SECONDS = 4, 7.5, 2
"""A clip's frames, its frames a second, and the length of the stored segments."""
INGEST = (
    *("--video.fps", 15, "--video.segment-seconds", SEGMENT_SECONDS, "--video.crf", 12),
    *("--video.key-frame-every", 1, "--row-group-rows", 32),
)
"""Every frame is a key frame: training reads four frames at a random place, and would otherwise
spend most of a step on decoding the frames before them."""
SETS = (
    *(f"test/{variant}" for variant in (OLD, *NEW)),
    *(f"new/{variant}" for variant in NEW),
    f"train/{OLD}",
    "train/nohud",
    f"{OTHER_GAME}/{OLD}",
)
"""All sets. Frames of `train/nohud` only tell which test frames were seen in training."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Decoded clips of one set, in the order of games, files and time."""

    pixels_NFHWC: np.ndarray
    states_NV: np.ndarray
    """Of the middle frame; NaN where a game has fewer values."""
    games_N: np.ndarray
    keys_N: np.ndarray
    """File and frame of a clip; alike in all variants."""


def shards(cfg: Settings, name: str) -> Path:
    """Ingests a set and returns the folder of its shards."""
    out = cfg.work / "shards" / name
    job = f"ingest-{name.replace('/', '-')}"

    def run() -> dict[str, Any]:
        where = ("--source", cfg.footage / name, "--out", out)
        log = cfg.work / "logs" / f"{job}.log"
        ran = command("ingest", *where, *INGEST, log=log, prefix=cfg.prefix)
        return ran | {"segments": read_manifest(str(out)).num_samples}

    once(cfg.work / "jobs" / f"{job}.json", run)
    return out


def clips(cfg: Settings, name: str) -> Clips:
    """Decodes the clips of a set, or reads them from the work folder."""
    count = cfg.clips_of(name)
    folder = cfg.work / "clips" / f"{name.replace('/', '-')}-{count}"
    names = ("pixels_NFHWC", "states_NV", "games_N", "keys_N")
    if not (folder / "keys_N.npy").exists():
        made = _decode(cfg, name, count)
        folder.mkdir(parents=True, exist_ok=True)
        for array in names:  # the keys last: they say that all are there
            np.save(folder / f"{array}.npy", getattr(made, array))
    arrays = {array: np.load(folder / f"{array}.npy", mmap_mode="r") for array in names}
    return Clips(**arrays)


def _decode(cfg: Settings, name: str, count: int) -> Clips:
    uri = str(shards(cfg, name))
    games, prep = np.array(read_manifest(uri).classes), preprocessing_of(model(cfg))
    found = [clip for table in _tables(uri) for clip in _of_table(table, prep, count)]
    found.sort(key=lambda clip: (games[clip[0]], clip[1]))
    width = max(len(clip[2]) for clip in found)
    padded = [np.pad(c[2], (0, width - len(c[2])), constant_values=np.nan) for c in found]
    return Clips(
        pixels_NFHWC=np.stack([clip[3] for clip in found]),
        states_NV=np.stack(padded),
        games_N=games[[clip[0] for clip in found]],
        keys_N=np.array([clip[1] for clip in found]),
    )


def _tables(uri: str) -> Iterator[pa.Table]:
    """Yields all row groups."""
    manifest, (fs, root) = read_manifest(uri), open_uri(uri)
    columns = ("video", "num_frames", "fps", "start_s", "label", "source_uri", "states")
    for shard, group, _ in manifest.row_groups():
        yield read_row_group(fs, root, manifest.shards[shard].file, group, columns)


def _of_table(
    table: pa.Table, prep: Preprocessing, count: int
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """Yields label, key, state and uint8 pixels [F, H, W, C] of every clip."""
    for row in table.to_pylist():
        offsets_F = np.floor(np.arange(FRAMES) * row["fps"] / FPS + 1e-6).astype(int)
        latest = row["num_frames"] - 1 - int(offsets_F[-1])
        if latest < 0:
            continue
        wanted_KF = _first_frames(latest, count)[:, None] + offsets_F
        pixels_THWC = load_clip(row["video"], wanted_KF.flatten(), prep).pixels
        clips_KFHWC = pixels_THWC.reshape(-1, FRAMES, *pixels_THWC.shape[1:])
        for frames_F, clip_FHWC in zip(wanted_KF, clips_KFHWC, strict=True):
            second = row["start_s"] + frames_F[0] / row["fps"]
            key = f"{Path(row['source_uri']).name} {second:08.2f}"
            state = np.array(row["states"][int(frames_F[FRAMES // 2])], np.float32)
            yield row["label"], key, state, clip_FHWC


def _first_frames(latest: int, count: int) -> np.ndarray:
    """Returns the first frames of `count` clips, fewer in a short segment; of one its middle."""
    if count == 1:
        return np.array([latest // 2])
    return np.linspace(0, latest, max(1, min(count, 1 + latest // FRAMES))).astype(int)


@functools.cache
def _columns(path: Path) -> dict[str, list[str]]:
    return {game: found["states"] for game, found in json.loads(path.read_text()).items()}


def values_of(cfg: Settings, task: Task, part: Clips) -> tuple[np.ndarray, np.ndarray]:
    """Returns which clips have a value for a task, int64 [N], and the values, float32 [N]."""
    column = _columns(cfg.footage / "train/columns.json")[task.game].index(task.column)
    rows = np.flatnonzero(
        (part.games_N == task.game) & np.isfinite(part.states_NV[:, column].astype(np.float32))
    )
    return rows, np.asarray(part.states_NV[rows, column], np.float32)


def kept_keys(cfg: Settings) -> tuple[set[str], dict[str, dict[str, float]]]:
    """Finds the test clips whose middle frame no frame of training nearly equals.

    Compared are pictures without HUD, each game by itself: with those of the labelled episodes and
    of the unlabelled ones.

    Returns:
        The keys, with the game before each, of the clips that stay and are in every variant; and by
        game how many were tested and removed.
    """
    test = clips(cfg, "test/nohud")
    seen = [clips(cfg, "train/nohud"), clips(cfg, "new/nohud")]
    kept, counts = set[str](), {}
    for game in np.unique(test.games_N):
        rows = np.flatnonzero(test.games_N == game)
        train = np.concatenate([_middles(part, part.games_N == game) for part in seen])
        found = find_near_duplicates(train, _middles(test, rows))
        counts[str(game)] = found.report()
        kept |= {game_key(game, key) for key in test.keys_N[rows][found.kept_N]}
    for variant in (OLD, *NEW):
        part = clips(cfg, f"test/{variant}")
        kept &= {game_key(*pair) for pair in zip(part.games_N, part.keys_N, strict=True)}
    return kept, counts


def game_key(game: str, key: str) -> str:
    """Names a clip in all games."""
    return f"{game}/{key}"


def _middles(part: Clips, rows: np.ndarray) -> np.ndarray:
    return part.pixels_NFHWC[rows][:, FRAMES // 2]
