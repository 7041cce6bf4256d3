"""The main job by its command: `python -m pipelines.demo`, to the reply over HTTP.

At few steps, in a copy of the checkout whose sample is a fifth of the shipped one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch

from helpers.embedding import embed_here
from helpers.own_ray import python_path, without_ray
from helpers.repository import ROOT
from models.artifacts.artifact import load_artifact, save_artifact
from pipelines import demo as demo_module
from pipelines import embed as embed_module
from pipelines.config.jobs import EmbedConfig
from pipelines.demo import embedding_folder, main
from pipelines.embed import embed
from pipelines.fetchers import shipped
from pipelines.fetchers.shipped import SAMPLE_TAR, pack_sample

STEPS = 8

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("programs")]


@pytest.fixture(scope="module")
def demo(cifar_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder it ran in, and what it printed; with a Ray of its own, as on a fresh machine."""
    folder = tmp_path_factory.mktemp("demo")
    ignore = shutil.ignore_patterns("sample", "__pycache__")
    for package in ("models", "pipelines", "serve"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    archive = folder / SAMPLE_TAR.relative_to(ROOT)
    archive.parent.mkdir()
    pack_sample(cifar_sample, archive, train=50, test=16)
    env = without_ray() | {"PYTHONPATH": python_path(folder), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.demo", "--steps", str(STEPS)],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_it_ends_with_neighbours_asked_for_over_http(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    out = folder / "demo-out"
    for line in ("6/6 serve", "nearest training images", "kNN ", "report: ", "the demo took"):
        assert line in printed
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert (results["provenance"]["run"], results["provenance"]["step"]) == (
        "vicreg_cifar10_demo-seed0",
        STEPS,
    )
    assert {"encoder", "random_init", "raw_pixels"} == set(results["rows"])
    (vectors,) = (out / "embeddings").iterdir()
    tables = [pq.read_table(path) for path in sorted(vectors.glob("*.parquet"))]
    assert sum(table.num_rows for table in tables) == 500
    # One row a test image asked about, six neighbours each, all of them classes of the sample.
    table = printed[printed.index("nearest training images") :]
    rows = [line.split("\u2502") for line in table.splitlines() if line.count(", ") == 5]
    assert len(rows) == 5
    classes = set(results["classes"])
    assert all({name.strip() for name in row[2].split(",")} <= classes for row in rows)


def test_another_encoders_embeddings_have_a_folder_of_their_own(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "_run", embed_here)
    out = demo[0] / "demo-out"
    ours = load_artifact(str(out / "encoder"))
    assert embedding_folder(out, str(out / "encoder")).is_dir()
    with torch.no_grad():
        ours.encoder.norm.bias.add_(0.5)  # as another seed would
    save_artifact(tmp_path / "encoder", ours.encoder, ours.preprocessing, ours.provenance)
    vectors = embedding_folder(out, str(tmp_path / "encoder"))
    assert not vectors.exists()
    shards = str(out / "shards" / "test")
    cfg = EmbedConfig(artifact=str(tmp_path / "encoder"), data=shards, out=str(vectors))
    assert embed(cfg)["rows"] == 160


def test_other_settings_in_an_old_folder_are_refused_in_a_line(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Refused before Ray is needed: the shards of the small sample are there already.
    monkeypatch.setattr(demo_module, "start_ray", lambda: None)
    monkeypatch.setattr(shipped, "SAMPLE_TAR", demo[0] / SAMPLE_TAR.relative_to(ROOT))
    monkeypatch.chdir(demo[0])
    monkeypatch.setattr(sys, "argv", ["demo", "--steps", str(STEPS + 1)])
    with pytest.raises(SystemExit) as refused:
        main()
    message = str(refused.value)
    assert message.startswith("error: ")
    assert "--run.steps" in message
    assert "another --out than demo-out" in message
    assert not ray.is_initialized()
