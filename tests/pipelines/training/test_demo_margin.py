"""The demo's recipes beat their own random initialisation by kNN; broken runs must not.

VICReg (the demo's default) and LeJEPA must win by 6 points, I-JEPA by 3. These tests are slow,
because they are whole runs on the shipped sample:
`pytest -m slow tests/pipelines/training/test_demo_margin.py`
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.fake_training import FolderStore, change
from pipelines.config.ingest import IngestConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.rows import load_labelled, table_labels
from pipelines.dataset.shards import read_manifest
from pipelines.evaluation.features import extract_features, preprocessing_of
from pipelines.evaluation.probes.knn import knn_accuracy
from pipelines.evaluation.subject import random_init
from pipelines.ingest import ingest
from pipelines.loading.loader import train_batches
from pipelines.loading.plan import make_plan
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import load_encoder
from pipelines.runs.run_folder import read_metrics
from pipelines.training.contract import DataSource, Worker
from pipelines.training.trainer import train

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MARGINS = {"vicreg_cifar10_demo": 0.06, "lejepa_cifar10_demo": 0.06, "cifar10_demo": 0.03}
# Settings that remove what keeps each recipe from collapsing, and the metric that then shrinks.
CONTROLS = {
    "vicreg_cifar10_demo": {"vicreg_weights": (25.0, 0.0, 0.0)},
    "lejepa_cifar10_demo": {"sigreg_weight": 0.0},
    "cifar10_demo": {"target": "self"},
}
SHRINKS = {
    "vicreg_cifar10_demo": "embedded_std",
    "lejepa_cifar10_demo": "embedded_std",
    "cifar10_demo": "std",
}

of_each = pytest.mark.parametrize("name", list(MARGINS))


@pytest.fixture(scope="module")
def sample_shards(ray_local, cifar_sample, tmp_path_factory) -> tuple[str, str]:
    """Shards of the whole shipped sample: 2,500 training and 800 test images."""
    root = tmp_path_factory.mktemp("sample-shards")
    for split in ("train", "test"):
        ingest(IngestConfig(source=str(cifar_sample / split), out=str(root / split)))
    return str(root / "train"), str(root / "test")


def _recipe(name: str, shards: tuple[str, str], storage: Path) -> PretrainConfig:
    run = {"storage": str(storage), "probe_every": 0}
    data = dict(zip(("train", "test"), shards, strict=True))
    return change(RECIPES[name][1], data=data, run=run)


def _train(cfg: PretrainConfig) -> tuple[float, float]:
    """Trains in this process; returns the kNN accuracy of (trained, random) encoders."""
    manifest = read_manifest(cfg.data.train)
    plan = make_plan(manifest.row_groups(), cfg.data, cfg.run.seed)
    data = DataSource(train_batches, plan.batches_per_epoch, manifest.manifest_hash)
    store = FolderStore(Path(cfg.run.storage) / "checkpoints")
    outcome = train(cfg, Worker(), data, store, say=lambda line: None)
    assert outcome.step == (cfg.run.stop_after or cfg.run.steps)
    encoder, *_ = load_encoder(str(store.folder / f"checkpoint_{outcome.step:08d}"))
    return _knn(encoder, cfg), _knn(random_init(encoder, cfg.run.seed), cfg)


def _knn(encoder, cfg: PretrainConfig) -> float:
    prep = preprocessing_of(cfg.model)
    bank, query = (load_labelled(uri) for uri in (cfg.data.train, cfg.data.test))
    features = (extract_features(encoder, prep, rows) for rows in (bank, query))
    bank_ND, query_QD = features
    return knn_accuracy(bank_ND, table_labels(bank), query_QD, table_labels(query))


def _beats_random_init(name: str, trained: float, random: float) -> None:
    found = f"kNN {trained:.4f}, its random init {random:.4f}"
    assert trained - random >= MARGINS[name], found


def _show(capsys, name: str, trained: float, random: float) -> None:
    with capsys.disabled():
        print(f"\n{name}: kNN {trained:.4f}, its random init {random:.4f}")


@of_each
def test_the_recipe_beats_its_random_init(name, sample_shards, tmp_path, capsys):
    trained, random = _train(_recipe(name, sample_shards, tmp_path))
    _show(capsys, name, trained, random)
    _beats_random_init(name, trained, random)


@of_each
def test_a_frozen_random_encoder_fails_the_same_assertion(name, sample_shards, tmp_path, capsys):
    # At rate 0 no number of steps changes a weight, so few are as good as all.
    cfg = change(
        _recipe(name, sample_shards, tmp_path),
        optim={"lr": 0.0, "start_lr": 0.0, "final_lr": 0.0},
        run={"stop_after": 50},
    )
    trained, random = _train(cfg)
    _show(capsys, f"{name}, frozen", trained, random)
    with pytest.raises(AssertionError, match="its random init"):
        _beats_random_init(name, trained, random)


@of_each
def test_a_recipe_that_collapses_fails_the_same_assertion(name, sample_shards, tmp_path, capsys):
    # As long as the run that passes; the watch would end it early, which is tested elsewhere.
    cfg = change(
        _recipe(name, sample_shards, tmp_path), objective=CONTROLS[name], watch={"action": "off"}
    )
    trained, random = _train(cfg)
    _show(capsys, f"{name}, {CONTROLS[name]}", trained, random)
    rows = read_metrics(tmp_path / cfg.run.name / "metrics.jsonl")
    # Embeddings shrink before the first reading. SIGReg keeps them at 0.7 and above, VICReg at
    # 0.46.
    healthy = {"embedded_std": 0.46, "std": rows[0]["std"]}
    assert rows[-1][SHRINKS[name]] < 0.1 * healthy[SHRINKS[name]]
    with pytest.raises(AssertionError, match="its random init"):
        _beats_random_init(name, trained, random)
