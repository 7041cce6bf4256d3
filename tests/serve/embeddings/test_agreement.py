"""The same features wherever they are computed: by embed, by evaluation, and by the endpoint.

Each goes its own way to the pixels: rows of shards through the actor of embed, rows of shards
through the probes' sets, a request through the endpoint's decoder processes. That the features are
right is another matter, for which test_serve_fits.py has a reference.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from helpers.models.video_files import write_video
from helpers.pipelines.clips import FPS, segment
from helpers.pipelines.clips import write_rows as write_segments
from helpers.pipelines.loading import row_of, write_shards
from helpers.serve.embeddings import data_uri, encoded, picture, save_fitted_artifact
from helpers.serve.videos import local_server
from models.media.fit import Fit
from models.media.regions import Region
from pipelines import embed as job
from pipelines.config.jobs import EmbedConfig, EvaluateConfig
from pipelines.dataset.shards import IMAGE_SCHEMA
from pipelines.evaluation.input_sets import read_manifests, read_sets
from pipelines.evaluation.subject import load_subject, random_init, with_sampler

FITS: tuple[Fit, ...] = get_args(Fit)
HUD: Region = (0.0, 0.0, 0.3, 0.3)
PICTURE = encoded(picture(3, (160, 90)))


def frame(number: int, height: int, width: int) -> np.ndarray:
    return np.asarray(picture(number, (width, height)))


def video() -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, 30, rate=int(FPS), container="mp4", size=(54, 96), draw=frame)
    return buffer.getvalue()


def image_shards(folder: Path) -> str:
    rows = pa.Table.from_pylist([row_of(PICTURE, "picture", 0)], IMAGE_SCHEMA)
    return write_shards(folder, rows, 1, 1, classes=("one",))


def clip_shards(folder: Path, clip: bytes) -> str:
    row = segment(0) | {"video": clip, "num_frames": 30, "height": 54, "width": 96, "label": 0}
    return write_segments(folder, [row], ("one",))


def embedded(
    artifact: Path, shards: str, out: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any
) -> np.ndarray:
    """What `pipelines.embed` writes, with its actor in this process."""

    def run_here(parts: Any, cfg: EmbedConfig, *_: Any) -> None:
        actor = job.Embedder(cfg)
        for part in parts:
            actor({"part": json.dumps(dataclasses.asdict(part))})

    monkeypatch.setattr(job, "_run", run_here)
    threads = torch.get_num_threads()
    record = job.embed(EmbedConfig(artifact=str(artifact), data=shards, out=str(out), **flags))
    torch.set_num_threads(threads)
    (file,) = record["files"]
    return np.array(pq.read_table(out / file["file"])["embedding"][0].as_py())


def evaluated(artifact: Path, shards: str, **flags: Any) -> np.ndarray:
    """What the probes of `pipelines.evaluate` read."""
    cfg = EvaluateConfig(checkpoint=str(artifact), data=shards, test=shards, **flags)
    manifests = read_manifests(cfg)
    subject = with_sampler(cfg, load_subject(cfg.checkpoint), manifests[0].modality)
    baseline, console = random_init(subject.encoder, 0), Console(quiet=True)
    sets, _ = read_sets(cfg, subject, baseline, manifests, console)
    features = sets[0].features["encoder"]
    assert features.dtype == np.float32
    return np.asarray(features[0])


def served(artifact: Path, item: Any, *excludes: tuple[Region, ...] | None) -> list[np.ndarray]:
    """What one server answers to a request for each `exclude`."""
    found = []
    with local_server(artifact) as server:
        for exclude in excludes:
            body = {"input": [item], "normalize": False, "exclude": exclude}
            reply = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
            assert reply.status_code == 200, reply.text
            found.append(np.array(reply.json()["data"][0]["embedding"]))
    return found


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_served_embedded_and_evaluated_features_agree(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The artifact has a HUD of its own, which flags and requests may replace by nothing."""
    item: Any = data_uri(PICTURE)
    shards, clip = image_shards(tmp_path / "images"), {}
    if kind == "clip":  # 4 of 30 frames, from number 13
        data, clip = video(), {"frames": 4, "tubelet": 2}
        shards = clip_shards(tmp_path / "clips", data)
        item = {"video": data_uri(data, "video/mp4"), "fps": FPS, "start_s": 1.3, "end_s": 1.7}
    found: dict[tuple[Fit, Any], np.ndarray] = {}
    for fit in FITS:
        folder = save_fitted_artifact(tmp_path / fit, fit, 32, exclude=(HUD,), **clip)
        excludes = (None, ())
        for exclude, one in zip(excludes, served(folder, item, *excludes), strict=True):
            out, flags = tmp_path / f"out-{fit}-{exclude}", {"exclude": exclude}
            two = embedded(folder, shards, out, monkeypatch, **flags)
            assert capsys.readouterr().out.count("note: --data: the pictures") == (fit != "whole")
            three = evaluated(folder, shards, **flags)
            np.testing.assert_allclose(two, one, atol=1e-5, rtol=0)
            np.testing.assert_allclose(three, one, atol=1e-5, rtol=0)
            found[fit, exclude] = one
    # Control: another fit, or other regions, is seen.
    keys = list(found)
    for number, key in enumerate(keys):
        for other in keys[:number]:
            assert np.abs(found[key] - found[other]).max() > 1e-2, (key, other)
