"""LiDAR against its definition in numpy, its controls, and the probe that reads it online.

N samples, Q views, D features.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from helpers.pipelines.fake_training import MEMORY, FolderStore, change, tiny_config
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from pipelines.config.data import DataConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.dataset.rows import load_samples
from pipelines.evaluation.features import extract_features
from pipelines.evaluation.ranks import lidar, rankme
from pipelines.training.contract import Worker
from pipelines.training.probes.rank_probe import RankProbe
from pipelines.training.trainer import train


def _reference(features_NQD, delta, *, corrected=True):
    """exp(entropy) of the positive eigenvalues of V^-1/2 (B - W/Q) V^-1/2, by loops; without the
    correction the paper's own."""
    N, Q, D = features_NQD.shape
    mean = features_NQD.reshape(-1, D).mean(0)
    B, W = np.zeros((D, D)), np.zeros((D, D))
    for sample in features_NQD:
        own = sample.mean(0)
        B += np.outer(own - mean, own - mean) / (N - 1)
        for view in sample:
            W += np.outer(view - own, view - own) / (N * (Q - 1))
    values, vectors = np.linalg.eigh(W + delta * np.eye(D))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    p = np.linalg.eigvalsh(root @ (B - corrected * W / Q) @ root)
    p = np.maximum(p, 0) / np.maximum(p, 0).sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def _features(N, Q, D, *, spread, scatter, seed=0):
    """Samples of deviation `spread` [D], views about them of deviation `scatter` [D]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, 1, D)) * spread + rng.normal(size=(N, Q, D)) * scatter + 3.0


@pytest.mark.parametrize("delta", [1e-4, 0.3])
def test_lidar_equals_its_definition(delta):
    features = _features(40, 5, 12, spread=np.linspace(2, 0.1, 12), scatter=np.linspace(0.1, 1, 12))
    ours = lidar(torch.from_numpy(features), delta=delta)
    assert ours == pytest.approx(_reference(features, delta), rel=1e-9)
    assert ours != pytest.approx(_reference(features, 2 * delta), rel=1e-6)


def test_lidar_counts_the_directions_that_tell_samples_apart_and_rankme_all():
    ones = np.ones(16)
    assert lidar(torch.from_numpy(_features(2000, 4, 16, spread=ones, scatter=0.1 * ones))) > 15.5
    # Half of the directions are as large as the others, but are of the view only.
    half = np.repeat([1.0, 0.0], 8)
    mixed = _features(500, 10, 16, spread=half, scatter=0.1 * half + 1.0 * (1 - half))
    assert 7.5 < lidar(torch.from_numpy(mixed)) < 9
    assert rankme(torch.from_numpy(mixed).flatten(0, 1), centred=True) > 15


def test_few_views_do_not_drown_what_tells_samples_apart():
    # In 5 of 64 directions samples differ, as much as views of one sample do in all of them.
    few = np.repeat([1.0, 0.0], [5, 59])
    features = _features(512, 8, 64, spread=few, scatter=np.ones(64))
    many = _features(512, 200, 64, spread=few, scatter=np.ones(64))
    ideal = lidar(torch.from_numpy(many))
    assert 4.5 < ideal < 7
    assert lidar(torch.from_numpy(features)) < 2.5 * ideal
    assert _reference(features, 1e-4, corrected=False) > 6 * ideal


def test_collapsed_features_have_no_direction():
    rng = np.random.default_rng(0)
    constant = torch.full((50, 4, 16), 0.7)
    assert lidar(constant) == 1.0
    # What differs between equal samples in fp32, which would look like full rank.
    assert lidar(constant + 1e-8 * torch.from_numpy(rng.normal(size=(50, 4, 16))).float()) == 1.0
    line = rng.normal(size=(50, 1, 1)) * np.ones(16) + 1e-3 * rng.normal(size=(50, 4, 16))
    assert lidar(torch.from_numpy(line)) < 1.1
    assert np.isnan(lidar(torch.full((4, 4, 4), float("nan"))))
    with pytest.raises(ValueError, match="two views"):
        lidar(torch.zeros(4, 1, 4))


@pytest.fixture
def config(cifar_shards):
    return PretrainConfig(
        data=DataConfig(train=cifar_shards[0], batch_size=32),
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8),
    )


def _encoder(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(EncoderShape(image_size=32, patch_size=8, width=48, depth=1, heads=3))


@pytest.mark.ray
def test_the_probe_reads_fixed_samples_whatever_the_run(config):
    encoder = _encoder()
    found = RankProbe(config)(encoder)
    prep = Preprocessing(image_size=32, mean=config.model.mean, std=config.model.std)
    features = extract_features(encoder, prep, load_samples(config.data.train, 10_000))
    assert len(features) == 512  # of the set; the probe takes 2,048 of larger ones
    assert found["fixed_rankme"] == pytest.approx(rankme(torch.from_numpy(features)), rel=1e-6)
    other = change(
        config,
        data={"batch_size": 64, "crop_scale": (0.9, 1.0)},
        views={"globals": 3, "colour": 0.0},
        run={"seed": 7},
    )
    assert RankProbe(other)(encoder) == found
    assert RankProbe(config)(_encoder(seed=1)) != found
    assert 1 < found["lidar"] <= 48


@pytest.mark.ray
def test_the_probe_shows_collapse_and_survives_what_is_not_finite(config):
    encoder, probe = _encoder(), RankProbe(config)
    with torch.no_grad():
        encoder.norm.weight.zero_()
        encoder.norm.bias.fill_(1.0)
    found = probe(encoder)
    assert found["fixed_rankme"] < 1.01
    assert found["lidar"] == 1.0
    with torch.no_grad():
        encoder.norm.bias.fill_(float("nan"))
    assert all(np.isnan(value) for value in probe(encoder).values())


def test_a_run_logs_the_readings_and_reports_them_with_its_checkpoints(tmp_path, monkeypatch):
    def probe(encoder: nn.Module):
        return {"fixed_rankme": 5.0, "lidar": 4.0}

    monkeypatch.setattr("pipelines.training.recorder.RankProbe", lambda cfg: probe)
    cfg = change(tiny_config(tmp_path, steps=10), run={"rank_every": 4})
    store = FolderStore(tmp_path / "store")
    train(cfg, Worker(), MEMORY, store)
    lines = (tmp_path / cfg.run.name / "metrics.jsonl").read_text().splitlines()
    read = {row["step"] for row in map(json.loads, lines) if row.get("lidar") == 4.0}
    assert read == {4, 8, 10}
    assert [m["step"] for m in store.reported if m.get("fixed_rankme") == 5.0] == [4, 8, 10]
    never = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, name="never", rank_every=0))
    train(never, Worker(), MEMORY, FolderStore(tmp_path / "never-store"))
    assert "lidar" not in (tmp_path / "never" / "metrics.jsonl").read_text()
