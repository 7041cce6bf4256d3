"""The claim of `levjepa_movingmnist`, and three broken runs that must fail it.

With ten labels per class, the direction in which a digit moves is predicted at least 20 points
better from the trained encoder than from a random one, and than from a single frame. Digits of a
font stand in for MNIST's. These tests are slow, because they train four short runs:
`pytest -m slow tests/pipelines/training/test_motion_margin.py`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from helpers.pipelines.fake_training import FolderStore, change
from models.encoders.input_batch import InputBatch
from models.media.preprocessing import Preprocessing
from pipelines.config.ingest import IngestConfig, VideoConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.rows import load_labelled, table_labels
from pipelines.dataset.shards import read_manifest
from pipelines.evaluation.features import (
    compute_features,
    decode_all,
    encoder_features,
    single_frame,
)
from pipelines.evaluation.probes.few_shot import few_shot
from pipelines.evaluation.subject import random_init
from pipelines.fetchers.moving_mnist import write_moving
from pipelines.ingest import ingest
from pipelines.loading.clips import training_sampler
from pipelines.loading.loader import train_batches
from pipelines.loading.plan import make_plan
from pipelines.recipes.video import levjepa_movingmnist
from pipelines.runs.checkpoints import load_encoder
from pipelines.runs.run_folder import read_metrics
from pipelines.training.contract import DataSource, Worker
from pipelines.training.trainer import train

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MARGIN, STILL = 0.20, 0.20  # chance is 0.125
STEPS = 300


def _digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits drawn with Pillow's font at random size and tilt, [N, 28, 28], and their labels."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(10, size=count)
    pictures = []
    for label in labels_N:
        picture = Image.new("L", (28, 28))
        font = ImageFont.load_default(size=float(rng.uniform(20, 28)))
        ImageDraw.Draw(picture).text((14, 14), str(label), 255, font=font, anchor="mm")
        pictures.append(picture.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR))
    return np.stack([np.asarray(picture) for picture in pictures]), labels_N


@pytest.fixture(scope="module")
def moving_shards(ray_local, tmp_path_factory) -> tuple[str, str]:
    """Shards of 2,400 training and 600 test clips."""
    root = tmp_path_factory.mktemp("moving")
    splits = [("train", *_digits(500, 0)), ("test", *_digits(500, 1))]
    write_moving(splits, root / "clips", clips=2400, seed=0, edges="wrap")
    video = VideoConfig(fps=10, segment_seconds=2, key_frame_every=20, crf=10)
    for split in ("train", "test"):
        source, out = str(root / "clips" / split), str(root / split)
        ingest(IngestConfig(source=source, out=out, video=video))
    return str(root / "train"), str(root / "test")


@dataclasses.dataclass(frozen=True)
class Readings:
    """Accuracies of a ridge regression on the mean token, with ten labels per class."""

    trained: float
    random: float
    still: float


@pytest.fixture(scope="module")
def decoded(moving_shards) -> list[tuple[InputBatch, np.ndarray]]:
    """The clips and their directions, of the training and the test set."""
    cfg = levjepa_movingmnist()
    sampler, sets = training_sampler(cfg), [load_labelled(uri) for uri in moving_shards]
    return [(decode_all(rows, _prep(cfg), sampler), table_labels(rows)) for rows in sets]


def _prep(cfg: PretrainConfig) -> Preprocessing:
    model = cfg.model
    return Preprocessing(image_size=model.image_size, mean=model.mean, std=model.std)


def _recipe(shards: tuple[str, str], storage: Path) -> PretrainConfig:
    run = {"storage": str(storage), "probe_every": 0, "steps": STEPS, "checkpoint_every": STEPS}
    data = dict(zip(("train", "test"), shards, strict=True))
    return change(levjepa_movingmnist(), data=data, run=run)


def _train(cfg: PretrainConfig, decoded, batches=train_batches) -> Readings:
    """Trains in this process and predicts directions by encoder, random encoder and one frame."""
    manifest = read_manifest(cfg.data.train)
    plan = make_plan(manifest.row_groups(), cfg.data, cfg.run.seed)
    data = DataSource(batches, plan.batches_per_epoch, manifest.manifest_hash)
    store = FolderStore(Path(cfg.run.storage) / "checkpoints")
    outcome = train(cfg, Worker(), data, store, say=lambda line: None)
    encoder, *_ = load_encoder(str(store.folder / f"checkpoint_{outcome.step:08d}"))
    of = encoder_features(encoder.eval(), _prep(cfg))
    random = encoder_features(random_init(encoder, cfg.run.seed), _prep(cfg))
    featurizers = {"trained": of, "random": random, "still": single_frame(of)}
    bank, query = (compute_features(featurizers, clips.split(64)) for clips, _ in decoded)
    labels = [labels_N for _, labels_N in decoded]
    return Readings(
        **{
            name: few_shot(bank[name], labels[0], query[name], labels[1], per_class=10).mean
            for name in featurizers
        }
    )


def _reads_motion(readings: Readings) -> None:
    assert readings.trained - readings.random >= MARGIN, f"over random init: {readings}"
    assert readings.trained - readings.still >= MARGIN, f"over one frame: {readings}"
    assert readings.still <= STILL, f"one frame gives it away: {readings}"


def _show(capsys, name: str, readings: Readings) -> None:
    with capsys.disabled():
        print(f"\n{name}: {readings}")


def test_the_recipe_reads_directions(moving_shards, decoded, tmp_path, capsys):
    readings = _train(_recipe(moving_shards, tmp_path), decoded)
    _show(capsys, "levjepa_movingmnist", readings)
    _reads_motion(readings)


def test_a_frozen_random_encoder_fails_the_same_assertion(moving_shards, decoded, tmp_path, capsys):
    cfg = change(
        _recipe(moving_shards, tmp_path),
        optim={"lr": 0.0, "start_lr": 0.0, "final_lr": 0.0, "warmup_steps": 0},
        run={"steps": 10},
    )
    readings = _train(cfg, decoded)
    _show(capsys, "frozen", readings)
    with pytest.raises(AssertionError, match="over random init"):
        _reads_motion(readings)


def test_without_sigreg_it_fails_the_same_assertion(moving_shards, decoded, tmp_path, capsys):
    cfg = change(
        _recipe(moving_shards, tmp_path), objective={"sigreg_weight": 0.0}, watch={"action": "off"}
    )
    readings = _train(cfg, decoded)
    _show(capsys, "sigreg_weight=0", readings)
    rows = read_metrics(tmp_path / cfg.run.name / "metrics.jsonl")
    assert rows[-1]["sigreg"] > rows[0]["sigreg"]  # all embeddings alike
    with pytest.raises(AssertionError, match="over random init"):
        _reads_motion(readings)


def test_frames_in_random_order_fail_the_same_assertion(moving_shards, decoded, tmp_path, capsys):
    readings = _train(_recipe(moving_shards, tmp_path), decoded, _shuffled_batches)
    _show(capsys, "shuffled frames", readings)
    with pytest.raises(AssertionError, match="over random init"):
        _reads_motion(readings)


def _shuffled_batches(cfg: PretrainConfig, **where: int) -> Iterator[dict[str, torch.Tensor]]:
    """The loader's batches, with the frames of every clip shuffled."""
    generator = torch.Generator().manual_seed(cfg.run.seed)
    for batch in train_batches(cfg, **where):
        clips_BCTHW = batch["clips"]
        order_BT = torch.rand(len(clips_BCTHW), clips_BCTHW.shape[2], generator=generator).argsort()
        index = order_BT[:, None, :, None, None].expand_as(clips_BCTHW)
        yield {**batch, "clips": clips_BCTHW.gather(2, index)}
