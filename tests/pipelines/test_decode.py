"""The command that draws what a predictor expects, on clips, and the export of surprise."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from helpers.pipelines.clips import segment, write_rows
from helpers.pipelines.loading import write_samples
from helpers.pipelines.run_folders import save_untrained
from helpers.pipelines.walks import walk_segment
from models.artifacts.artifact import load_artifact
from models.beliefs.stored import load_surprise
from pipelines.config.data import ClipConfig, VideoMaskConfig
from pipelines.config.jobs import ExportConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.decode import DecodeConfig, decode
from pipelines.export import export
from pipelines.recipes.planning import worldmodel_tworooms


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root, rows = tmp_path_factory.mktemp("clips"), [segment(n) for n in range(20)]
    return write_rows(root / "train", rows[:12]), write_rows(root / "test", rows[12:])


@pytest.fixture(scope="module")
def checkpoint(sets: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained V-JEPA that hides half of the time."""
    folder = tmp_path_factory.mktemp("runs") / "clips" / "checkpoint_0"
    cfg = PretrainConfig(
        model=ModelConfig(encoder="video_micro", image_size=16, patch_size=8, frames=4, tubelet=1),
        clip=ClipConfig(stride=2),
        video_mask=VideoMaskConfig(blocks=(1,), scale=(1.0,), temporal_scale=(0.5,)),
        objective=ObjectiveConfig(name="vjepa", loss="l2", target_norm="batch"),
        run=RunConfig(name="clips", storage=str(folder.parent.parent)),
    )
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, train=sets[0]))
    return save_untrained(cfg, folder)


def test_a_run_is_drawn_measured_and_told(
    checkpoint: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    shown = io.StringIO()
    cfg = DecodeConfig(
        checkpoint=checkpoint, data=sets[0], test=sets[1], out=str(tmp_path), steps=3, limit=12
    )
    results = decode(cfg, console=Console(file=shown, width=200))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    beliefs = results["beliefs"]
    assert (beliefs["samples"], beliefs["train_samples"], beliefs["masks"]) == (8, 12, 3)
    assert set(beliefs["rows"]) == {"encoder", "random_init"}
    assert set(beliefs["rows"]["encoder"]) == {"mrr", "error", "cosine", "flow"}
    assert set(beliefs["cuts"]) == {"encoder", "random_init", "pixel_change"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/gif") == 8 * 8 + 2 * 8  # eight panels, and maps of surprise
    assert "hidden, expected" in page
    assert "AUROC" in shown.getvalue()
    names = load_file(tmp_path / "decoder.safetensors")
    assert {name.partition(".")[0] for name in names} == {"regression", "flow"}


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight walks in Two-Rooms, of which every fourth is too short for a clip."""
    root = tmp_path_factory.mktemp("walks")
    return write_rows(root, [walk_segment(root / "w", n, 5 if n % 4 else 17) for n in range(8)])


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"history": 2},
        {"history": 3, "recurrent_width": 12},
        {"perception": "conv", "predictor": "block_causal", "dynamics_width": 32},
    ],
    ids=["one frame", "two frames", "recurrent", "patches"],
)
def test_what_a_world_model_imagines_is_drawn_from_shards(
    own: dict, walks: str, tmp_path: Path
) -> None:
    base = worldmodel_tworooms()
    objective = dataclasses.replace(base.objective, latent_width=8, **own)
    cfg = dataclasses.replace(base, objective=objective)
    checkpoint = save_untrained(cfg, tmp_path / "runs/walks/checkpoint_0")
    job = DecodeConfig(
        checkpoint=checkpoint, data=walks, test=walks, out=str(tmp_path / "out"), steps=2
    )
    found = decode(job, console=Console(file=io.StringIO()))["rollouts"]
    assert found["samples"] == 2
    assert list(found["mrr"]["imagined"]) == ["1", "2", "5", "10", "12"]
    names = load_file(tmp_path / "out/decoder.safetensors")
    assert {name.partition(".")[0] for name in names} == {"latent"}


def test_walks_that_cannot_be_imagined_are_refused(
    walks: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    checkpoint = save_untrained(worldmodel_tworooms(), tmp_path / "runs/walks/checkpoint_0")
    cfg = DecodeConfig(checkpoint=checkpoint, data=walks, test=sets[1], out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--test: clip-\d+: the segment has no actions.*\nGive"):
        decode(cfg)
    few = write_rows(tmp_path / "few", [walk_segment(tmp_path, n, 17 if n else 5) for n in (0, 1)])
    with pytest.raises(ValueError, match=r"--test: 1 of the 2 segments .* 13 frames.*\nRanks need"):
        decode(dataclasses.replace(cfg, test=few))
    with pytest.raises(ValueError, match="--seed: must be between"):
        dataclasses.replace(cfg, seed=-1)


def test_other_data_and_other_encoders_are_refused(
    checkpoint: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    images = write_samples(tmp_path / "images")
    cfg = DecodeConfig(checkpoint=checkpoint, data=sets[0], test=images, out=str(tmp_path / "o"))
    with pytest.raises(ValueError, match=r"--test: .* holds images, but clips learned from videos"):
        decode(cfg)
    artifact = export(ExportConfig(checkpoint=checkpoint, out=str(tmp_path / "a")))
    with pytest.raises(ValueError, match="is an encoder alone"):
        decode(dataclasses.replace(cfg, checkpoint=artifact))
    with pytest.raises(ValueError, match="--test-limit: must be at least 2"):
        dataclasses.replace(cfg, test_limit=1)


@pytest.mark.parametrize(("kind", "count"), [("own", 3), ("future", 4)])
def test_an_artifact_carries_its_predictor_when_asked(
    checkpoint: str, tmp_path: Path, kind: str, count: int
) -> None:
    cfg = ExportConfig(checkpoint=checkpoint, out=str(tmp_path / "a"), surprise=kind)  # type: ignore[arg-type]
    artifact = load_artifact(export(cfg))
    surprise = load_surprise(cfg.out, artifact.encoder)
    assert surprise is not None
    assert len(surprise.masks) == count
    assert surprise.hidden_N.all()
    assert (surprise.usual_N > 0).all()
    assert surprise.expectation.standardised
    assert surprise.expectation.place_mean_ND.abs().sum() > 0


def test_surprise_that_cannot_be_told_is_refused(
    checkpoint: str, small_checkpoint: str, tmp_path: Path
) -> None:
    gone = ExportConfig(
        checkpoint=checkpoint,
        out=str(tmp_path / "a"),
        surprise="own",
        surprise_data=str(tmp_path / "gone"),
    )
    with pytest.raises((ValueError, FileNotFoundError), match="surprise"):
        export(gone)
    future = ExportConfig(checkpoint=small_checkpoint, out=str(tmp_path / "a"), surprise="future")
    with pytest.raises(ValueError, match="--surprise future: images have none"):
        export(future)
    with pytest.raises(ValueError, match="--surprise-data: goes with --surprise"):
        ExportConfig(checkpoint=checkpoint, out="x", surprise_data="y")
