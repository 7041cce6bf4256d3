"""What is read during a run on several sets: all of them, or the one that has the labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from helpers.pipelines.fake_training import change, tiny_config
from helpers.pipelines.loading import encode, picture, row_of, write_shards
from models.encoders.vit import build_encoder
from pipelines.config.train import PretrainConfig
from pipelines.dataset.rows import load_samples
from pipelines.dataset.shards import IMAGE_SCHEMA
from pipelines.evaluation.features import extract_features, preprocessing_of
from pipelines.evaluation.ranks import rankme
from pipelines.training.probes import rank_probe
from pipelines.training.probes.online_probe import build_probe
from pipelines.training.probes.rank_probe import RankProbe

KINDS = ("cat", "dog")


def shards(folder: Path, first: int, count: int, classes: tuple[str, ...] = ()) -> str:
    pictures = [encode(picture(first + i, 32, 32), "PNG") for i in range(count)]
    labels = [i % 2 if classes else None for i in range(count)]
    rows = [row_of(data, "", label) for data, label in zip(pictures, labels, strict=True)]
    table = pa.Table.from_pylist(rows, IMAGE_SCHEMA)
    return write_shards(folder, table, 100, 10, classes=classes)


@pytest.fixture
def mixed(tmp_path: Path) -> PretrainConfig:
    """Unlabelled new footage, and a quarter of the batch of labelled old footage."""
    new, old = shards(tmp_path / "new", 0, 60), shards(tmp_path / "old", 100, 40, KINDS)
    test = shards(tmp_path / "test", 200, 20, KINDS)
    data = {"train": new, "mix": (old,), "mix_shares": (0.25,), "test": test}
    return change(tiny_config(tmp_path, probe_every=1), data=data)


def test_ranks_are_of_all_sets_in_their_shares(
    mixed: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_probe, "RANKME_ROWS", 40)
    torch.manual_seed(0)
    encoder = build_encoder("vit_micro32", image_size=32, patch_size=8)
    prep = preprocessing_of(mixed.model)
    parts = [load_samples(mixed.data.train, 30), load_samples(mixed.data.mix[0], 10)]
    both = np.concatenate([extract_features(encoder, prep, part) for part in parts])
    found = RankProbe(mixed)(encoder)["fixed_rankme"]
    assert found == pytest.approx(rankme(torch.from_numpy(both)), rel=1e-5)
    alone = change(mixed, data={"mix": (), "mix_shares": ()})
    assert RankProbe(alone)(encoder)["fixed_rankme"] != pytest.approx(found, rel=1e-3)


def test_the_online_probe_takes_the_set_that_has_labels(mixed: PretrainConfig) -> None:
    said: list[str] = []
    probe = build_probe(mixed, said.append)
    assert said == []
    assert probe is not None
    assert [len(labels) for labels in probe._labels] == [40, 20]
    assert set(probe._labels[0].tolist()) == {0, 1}
    # The control: without the labelled set there is none, and the run says of which set.
    alone = change(mixed, data={"mix": (), "mix_shares": ()})
    assert build_probe(alone, said.append) is None
    assert said[0].startswith("no online kNN: --data.train: these shards have no labels")
