"""Artifacts, embeddings and a sweep that commit ae55864 wrote."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
import transformers
from torch import Tensor

from helpers.pipelines.fake_training import change
from models.artifacts.artifact import load_artifact
from models.encoders.input_batch import InputBatch
from models.media.preprocessing import normalize
from pipelines import sweep as job
from pipelines.config.data import ClipConfig
from pipelines.config.jobs import EmbedConfig, SweepConfig
from pipelines.config.run import RunConfig
from pipelines.dataset.shards import read_rows
from pipelines.embed import embed
from pipelines.evaluation.features import decode_all, encoder_features
from pipelines.loading.clips import ClipSampler
from pipelines.recipes.images import debug
from pipelines.runs.checkpoints import read_config

DATA = {"image": "test", "video": "video"}
RTOL, ATOL = 1e-4, 1e-5


def embeddings(old: Path, kind: str) -> Tensor:
    """What the old code made of a data set with the artifact, in the order of the data set."""
    folder = old / "embeddings" / kind
    files = json.loads((folder / "embed.json").read_text())["files"]
    rows = [row for file in files for row in pq.read_table(folder / file["file"]).to_pylist()]
    data = read_rows(old / "shards" / DATA[kind], columns=["sample_id"])
    assert [row["sample_id"] for row in rows] == data["sample_id"].to_pylist()
    return torch.tensor([row["embedding"] for row in rows])


def samples(old: Path, kind: str) -> InputBatch:
    """The data set under the artifact's transform."""
    artifact = load_artifact(old / "artifacts" / kind)
    clips = ClipSampler(frames=artifact.encoder.frames, settings=ClipConfig())
    rows = read_rows(old / "shards" / DATA[kind])
    return decode_all(rows, artifact.preprocessing, clips if kind == "video" else None)


@pytest.mark.parametrize("kind", DATA)
def test_an_artifact_gives_the_old_features_here(kind: str, old: Path) -> None:
    artifact = load_artifact(old / "artifacts" / kind)
    assert artifact.provenance["step"] == 6
    featurize = encoder_features(artifact.encoder, artifact.preprocessing)
    found = featurize(samples(old, kind))
    torch.testing.assert_close(found, embeddings(old, kind), rtol=RTOL, atol=ATOL)


def test_an_image_artifact_gives_the_old_features_in_timm_and_transformers(old: Path) -> None:
    folder = old / "artifacts" / "image"
    prep = load_artifact(folder).preprocessing
    images_BCHW = normalize(samples(old, "image").pixels, prep.mean, prep.std)
    was = embeddings(old, "image")
    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    in_transformers = transformers.IJepaModel.from_pretrained(folder / "transformers").eval()
    with torch.inference_mode():
        torch.testing.assert_close(in_timm(images_BCHW), was, rtol=RTOL, atol=ATOL)
        tokens_BND = in_transformers(pixel_values=images_BCHW).last_hidden_state
        torch.testing.assert_close(tokens_BND.mean(1), was, rtol=RTOL, atol=ATOL)


def test_a_video_artifact_gives_the_old_features_in_transformers(old: Path) -> None:
    folder = old / "artifacts" / "video"
    prep = load_artifact(folder).preprocessing
    clips_BCFHW = normalize(samples(old, "video").pixels, prep.mean, prep.std)
    theirs = transformers.VJEPA2Model.from_pretrained(folder / "transformers").eval()
    with torch.inference_mode():
        output = theirs(clips_BCFHW.transpose(1, 2), skip_predictor=True)
    found = output.last_hidden_state.mean(1)
    torch.testing.assert_close(found, embeddings(old, "video"), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("kind", DATA)
def test_old_embeddings_are_complete_for_the_same_command(kind: str, old: Path) -> None:
    out = old / "embeddings" / kind
    record = json.loads((out / "embed.json").read_text())
    cfg = EmbedConfig(
        artifact=str(old / "artifacts" / kind),
        data=str(old / "shards" / DATA[kind]),
        out=str(out),
    )
    again = embed(cfg)  # would start Ray if a file were missing
    assert again["key"] == record["key"]
    assert again["files"] == record["files"]


def test_another_version_of_an_artifact_is_refused(old: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(old / "artifacts" / "image", tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    config["rayjepa"]["schema_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="artifact schema 99, this code reads"):
        load_artifact(folder)


def test_a_finished_sweep_is_known_and_has_its_rows(old: Path) -> None:
    out = old / "sweep"
    cfg = SweepConfig(space=("optim.lr=1e-4,1e-3",), out=str(out))
    first = read_config(out / "runs" / "trial_000")
    unnamed = {"name": debug().run.name, "storage": RunConfig().storage, "rank_every": 0}
    drawn, plan = job.make_plan(cfg, change(first, run=unnamed))
    book = job.ResultsFile(cfg, plan, drawn)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [dataclasses.asdict(row) for row in book.rows] == lines
    assert book.ended == [0, 1]
    assert book.unscored == []
