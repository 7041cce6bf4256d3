"""The main job by its command, at few steps: `python -m pipelines.demo`, to the reply over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from models.weights import load_artifact, save_artifact
from pipelines.config import EmbedConfig
from pipelines.demo import embedding_folder
from pipelines.embed import embed

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.ray


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With a Ray of its own, as on a fresh machine."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "pipelines.demo", *arguments],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(folder, "--steps", "60")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_it_ends_with_neighbours_asked_for_over_http(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    out = folder / "demo-out"
    for line in ("6/6 serve", "nearest training images", "kNN ", "report: ", "the demo took"):
        assert line in printed
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert (results["provenance"]["run"], results["provenance"]["step"]) == ("demo-seed0", 60)
    assert {"encoder", "random_init", "raw_pixels"} == set(results["rows"])
    (vectors,) = (out / "embeddings").iterdir()
    tables = [pq.read_table(path) for path in sorted(vectors.glob("*.parquet"))]
    assert sum(table.num_rows for table in tables) == 2500
    # One row a test image asked about, six neighbours each, all of them classes of the sample.
    table = printed[printed.index("nearest training images") :]
    rows = [line.split("\u2502") for line in table.splitlines() if line.count(", ") == 5]
    assert len(rows) == 5
    classes = set(results["classes"])
    assert all({name.strip() for name in row[2].split(",")} <= classes for row in rows)


def test_another_encoders_embeddings_have_a_folder_of_their_own(
    demo: tuple[Path, str], ray_local: None, tmp_path: Path
) -> None:
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
    assert embed(cfg)["rows"] == 800


def test_other_settings_in_an_old_folder_are_refused_without_a_traceback(
    demo: tuple[Path, str],
) -> None:
    done = run_demo(demo[0], "--steps", "61")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "--run.steps" in done.stderr
    assert "another --out than demo-out" in done.stderr
    assert "Traceback" not in done.stderr
