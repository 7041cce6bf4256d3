"""Exporting a checkpoint as an artifact that timm and transformers load."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pytest
import timm
import torch

import models.artifacts.formats.rayjepa
from models.artifacts.artifact import load_artifact
from pipelines.config.jobs import ExportConfig
from pipelines.export import export
from pipelines.runs.checkpoints import load_encoder


@pytest.fixture
def images_BCHW() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_export_gives_the_target_encoder_to_all_three(
    small_checkpoint: str, tmp_path: Path, images_BCHW: torch.Tensor
) -> None:
    transformers = pytest.importorskip("transformers")
    out = export(ExportConfig(checkpoint=small_checkpoint, out=str(tmp_path / "artifact")))
    encoder, config, _ = load_encoder(small_checkpoint)
    expected = encoder.eval()(images_BCHW)
    artifact = load_artifact(out)
    assert torch.equal(artifact.encoder(images_BCHW), expected)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    torch.testing.assert_close(theirs.forward_features(images_BCHW), expected, atol=1e-4, rtol=0)
    theirs = transformers.IJepaModel.from_pretrained(f"{out}/transformers")
    hidden = theirs(pixel_values=images_BCHW).last_hidden_state
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=0)
    assert artifact.preprocessing.image_size == config.model.image_size
    assert artifact.preprocessing.mean == config.model.mean
    known = {key: artifact.provenance[key] for key in ("run", "step", "manifest_hash", "preset")}
    assert known == {"run": "small", "step": 30, "manifest_hash": "abc", "preset": "vit_micro32"}


def test_a_remote_artifact_is_replaced_and_nothing_else(
    small_checkpoint: str, images_BCHW: torch.Tensor
) -> None:
    memory = fsspec.filesystem("memory")
    cfg = ExportConfig(checkpoint=small_checkpoint, out="memory://exports/one")
    export(cfg)
    memory.pipe_file("/exports/one/config.json", json.dumps({"rayjepa": "old"}).encode())
    export(cfg)
    encoder, _, _ = load_encoder(small_checkpoint)
    assert torch.equal(load_artifact(cfg.out).encoder(images_BCHW), encoder.eval()(images_BCHW))
    assert memory.exists("/exports/one/transformers/model.safetensors")
    memory.pipe_file("/exports/two/thesis.tex", b"years")
    with pytest.raises(ValueError, match="not replacing"):
        export(ExportConfig(checkpoint=small_checkpoint, out="memory://exports/two"))
    assert memory.ls("/exports/two", detail=False) == ["/exports/two/thesis.tex"]


def test_an_artifact_that_reads_back_differently_is_not_published(
    small_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = models.artifacts.formats.rayjepa.save_tensors

    def damaged(state, path, metadata):
        state = dict(state)
        if "blocks.0.mlp.fc1.bias" in state:
            state["blocks.0.mlp.fc1.bias"] = state["blocks.0.mlp.fc1.bias"] + 1e-3
        write(state, path, metadata)

    monkeypatch.setattr(models.artifacts.formats.rayjepa, "save_tensors", damaged)
    with pytest.raises(RuntimeError, match="other features"):
        export(ExportConfig(checkpoint=small_checkpoint, out=str(tmp_path / "artifact")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_exported_files_have_the_permissions_of_the_umask(
    small_checkpoint: str, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        export(ExportConfig(checkpoint=small_checkpoint, out=str(tmp_path / "artifact")))
    finally:
        os.umask(before)
    paths = [tmp_path / "artifact", *(tmp_path / "artifact").rglob("*")]
    assert {p.name for p in paths} > {"model.safetensors", "config.json", "transformers"}
    for path in paths:
        allowed = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == allowed & ~umask, path
