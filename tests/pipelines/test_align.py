"""Aligning new footage without training: the command, its file, and who takes it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from PIL import Image
from rich.console import Console

from helpers.embedding import embed_here
from helpers.pipelines.loading import encode, row_of, write_rows
from helpers.pipelines.refusals import Told, teller
from models.artifacts.alignment import alignment_bytes, load_alignment
from pipelines import embed as embed_job
from pipelines.align import align
from pipelines.config.jobs import AlignConfig, EmbedConfig, EvaluateConfig, ExportConfig
from pipelines.dataset.rows import load_samples
from pipelines.dataset.shards import read_manifest, write_manifest
from pipelines.evaluate import evaluate
from pipelines.evaluation.features import extract_features
from pipelines.evaluation.subject import load_subject
from pipelines.export import export

HUD = (0.0, 0.75, 1.0, 1.0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return teller(monkeypatch, capsys)


def picture(seed: int, label: int, hud: bool) -> Image.Image:
    """A noisy picture that is rather red or rather blue; a red HUD covers its lowest quarter."""
    rng = np.random.default_rng(seed)
    pixels_HWC = rng.integers(60, 140, (32, 32, 3))
    pixels_HWC[:, :, 2 * label] += 25
    if hud:
        pixels_HWC[24:] = (255, 0, 0)
    return Image.fromarray(pixels_HWC.astype(np.uint8))


def write(folder: Path, first: int, count: int, *, hud: bool, classes: bool = True) -> str:
    rows = [
        row_of(encode(picture(first + i, i % 2, hud), "PNG"), f"{i}", i % 2 if classes else None)
        for i in range(count)
    ]
    uri = write_rows(folder, rows)
    if classes:
        write_manifest(uri, dataclasses.replace(read_manifest(uri), classes=("red", "blue")))
    return uri


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("footage")
    return {
        "old": write(root / "old", 0, 200, hud=False),
        "old_test": write(root / "old_test", 1000, 100, hud=False),
        "new": write(root / "new", 2000, 200, hud=True, classes=False),
        "new_test": write(root / "new_test", 3000, 100, hud=True),
    }


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def aligned(
    footage: dict[str, str], small_checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    out = str(tmp_path_factory.mktemp("aligned") / "map.safetensors")
    old, new = footage["old"], footage["new"]
    align(AlignConfig(checkpoint=small_checkpoint, old=old, new=new, out=out), console=quiet())
    return out


@pytest.mark.parametrize("how", ["mean", "covariance"])
def test_the_drift_of_samples_that_the_map_has_not_seen_is_told(
    how: str, footage: dict[str, str], small_checkpoint: str, tmp_path: Path
) -> None:
    out, console = str(tmp_path / "map.safetensors"), quiet()
    cfg = AlignConfig(
        checkpoint=small_checkpoint, old=footage["old"], new=footage["new"], out=out, how=how
    )
    found = align(dataclasses.replace(cfg, limit=150), console=console)
    assert found["samples"] == {"old": 150, "new": 150}
    assert found["before"]["mean"] > 1
    assert 0 < found["after"]["mean"] < 0.4 * found["before"]["mean"]
    origin = load_alignment(out).origin
    fit = load_subject(small_checkpoint).preprocessing.fit
    assert (origin.how, origin.name, origin.fit) == (how, "small", fit)
    assert (origin.clip, origin.samples) == (None, found["samples"])
    assert f"{found['after']['mean']:.3f}" in console.file.getvalue()
    # Nothing moved: old footage beside other old footage.
    still = align(dataclasses.replace(cfg, new=footage["old_test"]), console=quiet())
    assert still["before"]["mean"] < 0.5


def test_a_region_left_out_takes_its_drift_with_it(
    footage: dict[str, str], small_checkpoint: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "map.safetensors")
    cfg = AlignConfig(checkpoint=small_checkpoint, old=footage["old"], new=footage["new"], out=out)
    with_hud = align(cfg, console=quiet())
    without = align(dataclasses.replace(cfg, exclude=(HUD,)), console=quiet())
    assert without["before"]["mean"] < 0.4 * with_hud["before"]["mean"]
    assert load_alignment(out).origin.exclude == (HUD,)


def test_sets_that_do_not_go_together(
    told: Told, footage: dict[str, str], small_checkpoint: str, tmp_path: Path
) -> None:
    here = ("--checkpoint", small_checkpoint, "--out", tmp_path / "map.safetensors")
    both = ("--old", footage["old"], "--new", footage["new"])
    two = write(tmp_path / "two", 0, 2, hud=True, classes=False)
    for flags, message in (
        ((*both, "--only", "red"), "--only: no class 'red' in --new; there are none"),
        (("--old", footage["old"], "--new", two), "of 2 samples there are no statistics"),
        (("--old", tmp_path / "none", "--new", two), "--old: "),
        ((*both, "--checkpoint", tmp_path), "--checkpoint: no artifact"),
    ):
        assert message in told("align", *here, *flags)
    assert not (tmp_path / "map.safetensors").exists()


def shifted_rows(footage: dict[str, str], checkpoint: str, align: str, out: Path) -> dict:
    cfg = EvaluateConfig(
        checkpoint=checkpoint,
        data=footage["old"],
        test=footage["old_test"],
        shift_test=footage["new_test"],
        align=align,
        out=str(out),
        probe_epochs=20,
    )
    return evaluate(cfg, console=quiet())["rows"]


def test_evaluate_reads_old_probes_on_aligned_features_of_the_shift(
    footage: dict[str, str], aligned: str, small_checkpoint: str, tmp_path: Path
) -> None:
    rows = shifted_rows(footage, small_checkpoint, aligned, tmp_path / "evaluation")
    assert list(rows)[:2] == ["encoder", "encoder_aligned"]
    plain, mapped = rows["encoder"]["linear"], rows["encoder_aligned"]["linear"]
    assert mapped["accuracy"] == plain["accuracy"] > 0.9
    assert plain["shift_accuracy"] < 0.7
    assert mapped["shift_accuracy"] > 0.85
    assert "Encoder, shift aligned" in (tmp_path / "evaluation" / "report.html").read_text()
    # Negative control: aligned by footage that is not the new one, as if nothing had moved.
    unrelated = str(tmp_path / "unrelated.safetensors")
    old, other = footage["old"], footage["old_test"]
    align(AlignConfig(checkpoint=small_checkpoint, old=old, new=other, out=unrelated))
    rows = shifted_rows(footage, small_checkpoint, unrelated, tmp_path / "control")
    assert rows["encoder_aligned"]["linear"]["shift_accuracy"] < 0.7


def test_evaluate_refuses_an_alignment_of_other_features(
    told: Told,
    footage: dict[str, str],
    aligned: str,
    small_checkpoint: str,
    tmp_path: Path,
) -> None:
    here = ("--checkpoint", small_checkpoint, "--data", footage["old"])
    here += ("--test", footage["old_test"], "--out", tmp_path / "out", "--align", aligned)
    shifted = (*here, "--shift-test", footage["new_test"])
    said = told("evaluate", *shifted, "--exclude", "0,0.75,1,1")
    assert said.startswith(f"error: --align: {aligned} is for other features, those of small:")
    assert "exclude [] there, [(0.0, 0.75, 1.0, 1.0)] here" in said
    assert "--align: maps the features of --shift-test" in told("evaluate", *here)
    stored = load_alignment(aligned)
    paired = tmp_path / "paired.safetensors"
    origin = dataclasses.replace(stored.origin, how="paired")
    paired.write_bytes(alignment_bytes(stored.alignment, origin))
    assert "maps an adapted encoder's features" in told("evaluate", *shifted, "--align", paired)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooling", ["mean", "patches"])
def test_embed_writes_aligned_embeddings(
    pooling: str,
    footage: dict[str, str],
    aligned: str,
    small_checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The alignment of a checkpoint is also that of its exported artifact."""
    monkeypatch.setattr(embed_job, "_run", embed_here)
    artifact = str(tmp_path / "artifact")
    export(ExportConfig(checkpoint=small_checkpoint, out=artifact))
    cfg = EmbedConfig(
        artifact=artifact, data=footage["new"], out=str(tmp_path / "e"), align=aligned
    )
    cfg = dataclasses.replace(cfg, pooling=pooling)
    record = embed_job.embed(cfg)
    assert record["align"]["how"] == "mean"
    column = pq.read_table(tmp_path / "e" / record["files"][0]["file"])["embedding"]
    found = column.combine_chunks().flatten().to_numpy().reshape(record["rows"], *record["shape"])
    subject = load_subject(artifact)
    features = extract_features(
        subject.encoder,
        subject.preprocessing,
        load_samples(footage["new"], 1000),
        pooling=pooling,
    )
    expected = features + safetensors.numpy.load_file(aligned)["bias"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, features, atol=1e-3)
    with pytest.raises(ValueError, match="holds something else"):
        embed_job.embed(dataclasses.replace(cfg, align=None))
    with pytest.raises(ValueError, match="is for other features"):
        embed_job.embed(dataclasses.replace(cfg, exclude=(HUD,), out=str(tmp_path / "other")))
