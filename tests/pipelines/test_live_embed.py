"""Embeddings of a data set that grows: new shards only, each segment once.

N segments, D features.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.embedding import embed_here
from helpers.models.video_files import write_video
from models.artifacts.artifact import save_artifact
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from pipelines import embed as job
from pipelines.config.data import ClipConfig
from pipelines.config.ingest import IngestConfig, VideoConfig
from pipelines.config.jobs import EmbedConfig
from pipelines.dataset.live_set import LiveSet, Timeline
from pipelines.dataset.shards import hash_bytes, read_rows
from pipelines.evaluation.features import extract_features
from pipelines.loading.clips import ClipSampler

PREP = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
LINE = Timeline(identity="", origin=Fraction(0), end=Fraction(1))


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 1, "heads": 3}
    return VisionTransformer(EncoderShape(**sizes, frames=4, tubelet=2)).eval()


@pytest.fixture
def cfg(
    encoder: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EmbedConfig]:
    save_artifact(tmp_path / "artifact", encoder, PREP, {"run": "r", "step": 7})
    monkeypatch.setattr(job, "_run", embed_here)
    places = {"artifact": "artifact", "data": "shards", "out": "embeddings"}
    threads = torch.get_num_threads()
    yield EmbedConfig(**{name: str(tmp_path / place) for name, place in places.items()}, stride=2)
    torch.set_num_threads(threads)  # the actor takes the machine's


def live_set(cfg: EmbedConfig) -> LiveSet:
    return LiveSet(
        IngestConfig(source="x", out=cfg.data, follow=True, video=VideoConfig(), row_group_rows=2)
    )


def rows(*numbers: int) -> list[dict[str, Any]]:
    """Segments of different lengths."""
    found = []
    for number in numbers:
        buffer = write_video(io.BytesIO(), 6 + number, rate=10, container="mp4")
        found.append(
            {
                "sample_id": hash_bytes(b"%d" % number),
                "video": buffer.getvalue(),
                "num_frames": 6 + number,
                "fps": 10.0,
                "start_s": float(number),
                "height": 48,
                "width": 64,
                "source_uri": "x",
                "recorded_at": dt.datetime(2026, 1, 1, 0, 0, number, tzinfo=dt.UTC),
                "moments": [0.5] * 6,
            }
        )
    return found


def read(cfg: EmbedConfig, record: dict[str, Any]) -> pa.Table:
    return pa.concat_tables([pq.read_table(Path(cfg.out) / f["file"]) for f in record["files"]])


def check(cfg: EmbedConfig, record: dict[str, Any], encoder: VisionTransformer) -> None:
    """Every row of the set once, in order, with the encoder's values."""
    table, source = read(cfg, record), read_rows(cfg.data)
    for name in ("sample_id", "start_s", "recorded_at", "source_uri"):
        assert table[name].to_pylist() == source[name].to_pylist()
    sampler = ClipSampler(frames=4, settings=ClipConfig(stride=2))
    expected_ND = extract_features(encoder, PREP, source, sampler=sampler)
    values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 48)
    np.testing.assert_allclose(values, expected_ND, atol=1e-5)
    assert np.abs(np.diff(values, axis=0)).max() > 1e-3  # they are not all the same


def test_run_again_it_embeds_new_shards_only(cfg: EmbedConfig, encoder: VisionTransformer) -> None:
    with live_set(cfg) as growing:
        growing.publish(rows(0, 1, 2), LINE, {})
        first = job.embed(cfg)
        check(cfg, first, encoder)
        stamps = {path: path.stat().st_mtime_ns for path in Path(cfg.out).glob("*.parquet")}
        growing.publish(rows(3), LINE, {})
        second = job.embed(cfg)
    check(cfg, second, encoder)
    assert second["rows"] == 4
    assert second["files"][: len(first["files"])] == first["files"]
    assert second["key"] == first["key"]
    assert second["manifest_hash"] != first["manifest_hash"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    with pytest.raises(ValueError, match="holds something else"):
        job.embed(dataclasses.replace(cfg, stride=1))


class Script:
    """In place of the event that signals set: every wait does the next thing, and takes no time."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)

    def is_set(self) -> bool:
        return not self._steps

    def wait(self, seconds: float) -> bool:
        self._steps.pop(0)()
        return self.is_set()


def test_follow_embeds_what_comes_until_ingest_ends(
    cfg: EmbedConfig, encoder: VisionTransformer
) -> None:
    growing = live_set(cfg)
    after_the_end = pytest.fail
    script = Script(
        lambda: growing.publish(rows(0, 1), LINE, {}),
        lambda: None,
        lambda: growing.publish(rows(2), LINE, {}),
        lambda: growing.publish(rows(3, 4), LINE, {}),
        lambda: growing.__exit__(None),
        after_the_end,
    )
    record = job.follow(cfg, script)  # type: ignore[arg-type]
    assert record is not None
    assert record["rows"] == 5
    assert len(record["files"]) == 3
    check(cfg, record, encoder)
    assert json.loads((Path(cfg.out) / job.RECORD).read_text()) == json.loads(json.dumps(record))


def test_follow_stops_when_told_and_goes_on_where_it_was(
    cfg: EmbedConfig, encoder: VisionTransformer
) -> None:
    with live_set(cfg) as growing:
        growing.publish(rows(0), LINE, {})
        record = job.follow(cfg, Script(lambda: None))  # type: ignore[arg-type]
        assert record is not None
        assert record["rows"] == 1
        growing.publish(rows(1), LINE, {})
    again = job.follow(cfg, Script(lambda: pytest.fail("ingest has ended")))  # type: ignore[arg-type]
    assert again is not None
    check(cfg, again, encoder)


def test_only_what_grows_is_followed(cfg: EmbedConfig) -> None:
    with live_set(cfg) as growing:
        manifest = growing.publish(rows(0), LINE, {})
    finished = dataclasses.replace(manifest, live=None)
    (Path(cfg.data) / "manifest.json").write_text(finished.to_json())
    with pytest.raises(ValueError, match="--follow"):
        job.follow(cfg, Script(lambda: None))  # type: ignore[arg-type]
    # The same rows as a finished set: embedded as such.
    assert job.embed(cfg)["rows"] == 1
