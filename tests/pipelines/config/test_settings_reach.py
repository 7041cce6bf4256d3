"""Settings whose effect no other test sees: each reaches what it is about."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from helpers.pipelines.fake_training import change, tiny_config
from helpers.pipelines.loading import config, write_samples
from models.image_size import Grid
from models.keyed_random.arrays import sample_keys
from pipelines.config.data import MaskConfig
from pipelines.config.jobs import EmbedConfig, EvaluateConfig
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.attentive import ATTENTIVE, attentive_probe
from pipelines.evaluation.probes.knn import KNN
from pipelines.evaluation.probes.probe import ProbeTask
from pipelines.loading.loader import make_reader
from pipelines.loading.masks.multiblock import multiblock_masks
from pipelines.loading.plan import pieces
from pipelines.loading.read_tasks import read_piece
from pipelines.training.launch import _run_config

KEYS = sample_keys([i.to_bytes(16, "little") for i in range(256)], 0, 0)


def _crops(cfg) -> np.ndarray:
    """Width and height of every crop of an epoch's first steps, as the read tasks draw them."""
    reader = make_reader(cfg, 0, 1)
    piece = next(iter(pieces(reader.plan, 0, 4, reader.most_batches)))
    tables = list(read_piece(reader, piece))
    boxes = np.concatenate([np.stack(t.column("crop").to_pylist()) for t in tables])
    return boxes[:, 2:] - boxes[:, :2]


def test_crop_ratio(tmp_path: Path) -> None:
    data = write_samples(tmp_path)
    square = _crops(config(data, crop_scale=(0.2, 0.5), crop_ratio=(1.0, 1.0)))
    wide = _crops(config(data, crop_scale=(0.2, 0.3), crop_ratio=(1.9, 2.0)))
    assert len(square) >= 32
    assert np.mean(np.abs(square[:, 0] - square[:, 1]) <= 1) > 0.95  # but where none fits
    assert np.mean(wide[:, 0] > 1.5 * wide[:, 1]) > 0.9


def test_context_scale() -> None:
    def extent(scale: tuple[float, float]) -> np.ndarray:
        """Sides of the box around each context, of a grid of 14."""
        mask = MaskConfig(context_scale=scale, target_scale=(0.02, 0.03), context_keep=4)
        context_BK = multiblock_masks(KEYS, Grid(14, 14), mask)[0]
        rows, columns = context_BK // 14, context_BK % 14
        return np.stack([np.ptp(rows, axis=1), np.ptp(columns, axis=1)], 1) + 1

    small, large = extent((0.2, 0.2)), extent((1.0, 1.0))
    assert small.max() <= 6  # 6 x 6 is 0.18 of the grid
    assert large.max() > 10


def test_max_failures_and_what_is_kept_reach_ray_train(tmp_path: Path) -> None:
    run = {"max_failures": 7, "keep_checkpoints": 5}
    for probe_every, score in ((0, None), (4, "score")):
        made = _run_config(tiny_config(tmp_path, probe_every=probe_every, **run), ())
        assert made.failure_config.max_failures == 7
        assert made.checkpoint_config.num_to_keep == 5
        assert made.checkpoint_config.checkpoint_score_attribute == score
    unlimited = change(tiny_config(tmp_path), run={"max_failures": -1})
    assert _run_config(unlimited, ()).failure_config.max_failures == -1


def _set(seed: int, tokens: int = 0) -> ProbeSet:
    """Two noisy classes of 40 rows each."""
    generator = np.random.default_rng(seed)
    labels = np.arange(80) % 2
    features = generator.normal(size=(80, 6)).astype(np.float32)
    features[:, 0] += labels
    more = generator.normal(size=(80, tokens, 6)).astype(np.float16) if tokens else None
    if more is not None:
        more[:, 0, 0] += 3 * labels
        more *= 0.05
    return ProbeSet(
        uri="x",
        features={"encoder": features},
        labels_N=labels,
        places_N3=np.zeros((80, 3), np.int64),
        ids_N16=np.arange(80 * 16, dtype=np.uint16).reshape(80, 16).astype(np.uint8),
        tokens={} if more is None else {"encoder": more},
    )


def _task(train: ProbeSet, test: ProbeSet, cfg: EvaluateConfig) -> ProbeTask:
    return ProbeTask(row="encoder", train=train, test=test, cfg=cfg, heads=2)


def _evaluation(**settings) -> EvaluateConfig:
    return EvaluateConfig(checkpoint="x", data="y", test="z", probe_epochs=1, **settings)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (20, 5.0), (3, 0.07)])
def test_knn_k_and_temperature(k: int, temperature: float) -> None:
    """Against the vote written out: weights exp(cosine / T) of the k nearest."""
    train, test = _set(0), _set(1)
    bank, query = (
        s.features["encoder"] / np.linalg.norm(s.features["encoder"], axis=1, keepdims=True)
        for s in (train, test)
    )
    similar = query @ bank.T
    right = 0
    for row, label in zip(similar, test.labels_N, strict=True):
        nearest = np.argsort(-row)[:k]
        weights = np.exp(row[nearest].astype(np.float64) / temperature)
        votes = [weights[train.labels_N[nearest] == c].sum() for c in (0, 1)]
        right += int(np.argmax(votes) == label)
    cfg = _evaluation(knn_k=k, knn_temperature=temperature)
    assert KNN.run(_task(train, test, cfg))["knn"] == pytest.approx(right / 80)


def test_knn_settings_change_the_vote() -> None:
    found = [
        KNN.run(_task(_set(0), _set(1), _evaluation(knn_k=k, knn_temperature=t)))["knn"]
        for k, t in ((20, 0.07), (20, 5.0), (3, 0.07))
    ]
    assert len(set(found)) == 3


SETTINGS = {
    "lrs": (3e-2, 1e-3),
    "decays": (0.4,),
    "epochs": 25,
    "standardise": True,
}


def test_attentive_settings() -> None:
    """The job's probe is `attentive_probe` of these very settings, of which each matters here."""
    sets = [_set(0, tokens=4), _set(1, tokens=4)]
    arrays = [part for s in sets for part in (s.tokens["encoder"], s.labels_N)]
    base = {"lrs": (1e-2,), "decays": (0.1,), "epochs": 2, "standardise": False}
    found = {}
    for name, value in {"none": None, **SETTINGS}.items():
        settings = base if name == "none" else base | {name: value}
        cfg = _evaluation(**{f"attentive_{key}": value for key, value in settings.items()})
        found[name] = ATTENTIVE.run(_task(*sets, cfg))["attentive"]
        passed = {"weight_decays" if k == "decays" else k: v for k, v in settings.items()}
        expected = attentive_probe(*arrays, heads=2, seed=0, **passed)
        assert found[name] == dataclasses.asdict(expected)
    none = found.pop("none")
    assert (none["lr"], none["weight_decay"]) == (1e-2, 0.1)
    assert {name for name in found if found[name] == none} == set()


def test_poll_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import embed as job

    waited = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return len(waited) == 2

    cfg = EmbedConfig(artifact="a", data=str(tmp_path), out="o", follow=True, poll_seconds=0.125)
    monkeypatch.setattr(job, "prepare", lambda cfg: cfg)
    monkeypatch.setattr(job, "load_artifact", lambda uri: None)
    monkeypatch.setattr(job, "Embedder", lambda cfg: None)
    assert job.follow(cfg, Stop()) is None
    assert waited == [0.125, 0.125]
    with pytest.raises(ValueError, match="--poll-seconds"):
        dataclasses.replace(cfg, poll_seconds=0.0)
