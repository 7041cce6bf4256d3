"""Pixel settings are set at ingest, stored in the manifest, kept by the artifact and served."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipelines.export as export_module
from helpers.models.picture_files import encode
from helpers.pipelines.evaluation import PREP, small_encoder
from helpers.pipelines.ingestion import run_quietly, settings
from models.artifacts.artifact import load_artifact, save_artifact
from models.media.preprocessing import Preprocessing
from pipelines.config.jobs import ExportConfig
from pipelines.dataset.shards import read_manifest
from pipelines.export import export
from pipelines.ingestion.entries.chunks import Chunk, chunk_to_json
from pipelines.ingestion.staging import chunk_key
from serve.embeddings.media.inputs import to_input

CLEAR = encode(Image.new("RGBA", (32, 32), (200, 30, 20, 0)), "PNG")
TWELVE_BITS = encode(Image.fromarray(np.full((32, 32), 4095, np.uint16)), "PNG")


def test_ingest_counts_dim_pictures_and_keeps_its_settings(
    in_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, data in enumerate((CLEAR, TWELVE_BITS, encode(Image.new("L", (8, 8)), "PNG"))):
        (source / f"{number}.png").write_bytes(data)
    run_quietly(settings(source, tmp_path / "plain"))
    assert read_manifest(tmp_path / "plain").notes == {"dim 16-bit images": 1}
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: 1 16-bit images use less than an eighth of their range" in shown
    assert "--deep-range" in shown
    run_quietly(settings(source, tmp_path / "told", deep_range=4095, background="white"))
    told = read_manifest(tmp_path / "told")
    assert told.notes == {}
    assert "warning" not in capsys.readouterr().out
    assert (told.ingest["background"], told.ingest["deep_range"]) == ("white", 4095)
    # Mean of white, white and black.
    np.testing.assert_allclose(told.mean, 2 / 3, atol=1e-6)


def test_both_shape_the_rows_of_images_only(tmp_path: Path) -> None:
    chunk = chunk_to_json(Chunk("folder", "file", ()))

    def key(modality: str, **changes: object) -> str:
        return chunk_key(chunk, settings(tmp_path, tmp_path, modality=modality, **changes))

    for changes in ({"background": "white"}, {"deep_range": "auto"}):
        assert key("image", **changes) != key("image")
        assert key("video", **changes) == key("video")


@pytest.mark.parametrize("asked", [{}, {"background": "1,2,3"}, {"deep_range": 1023}])
def test_an_export_takes_the_settings_of_its_shards_unless_told_otherwise(
    asked: dict[str, object],
    small_checkpoint: str,
    in_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.png").write_bytes(CLEAR)
    run_quietly(settings(tmp_path / "a.png", tmp_path / "s", background="white", deep_range=4095))
    ours = read_manifest(tmp_path / "s")
    load = export_module.load_objective

    def trained_on_them(uri: str):  # type: ignore[no-untyped-def]
        objective, config, info = load(uri)
        object.__setattr__(config.data, "train", str(tmp_path / "s"))
        return objective, config, info | {"manifest_hash": ours.manifest_hash}

    monkeypatch.setattr(export_module, "load_objective", trained_on_them)
    cfg = ExportConfig(checkpoint=small_checkpoint, out=str(tmp_path / "artifact"), **asked)  # type: ignore[arg-type]
    prep = load_artifact(export(cfg)).preprocessing
    assert prep.background == ((1, 2, 3) if "background" in asked else (255, 255, 255))
    assert prep.deep_range == asked.get("deep_range", 4095)


def test_an_export_whose_shards_are_gone_or_others_has_the_defaults(
    small_checkpoint: str, tmp_path: Path
) -> None:
    cfg = ExportConfig(checkpoint=small_checkpoint, out=str(tmp_path / "artifact"))
    prep = load_artifact(export(cfg)).preprocessing
    assert (prep.background, prep.deep_range) == ((0, 0, 0), 65535)


def test_artifacts_of_before_these_settings_are_read(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a", small_encoder(), PREP, {})
    file = tmp_path / "a" / "config.json"
    config = json.loads(file.read_text())
    config["rayjepa"]["schema_version"] = 1
    for name in ("background", "deep_range", "fit", "exclude"):
        del config["rayjepa"]["preprocessing"][name]
    file.write_text(json.dumps(config))
    (tmp_path / "a" / "digests.json").unlink()
    known = dataclasses.replace(PREP, patch_size=load_artifact(tmp_path / "a").encoder.patch_size)
    assert load_artifact(tmp_path / "a").preprocessing == known


def test_a_request_is_decoded_as_the_artifact_says() -> None:
    prep = Preprocessing(
        image_size=32, mean=(0,) * 3, std=(1,) * 3, background=(9, 8, 7), deep_range=4095
    )
    for data, colour in ((CLEAR, (9, 8, 7)), (TWELVE_BITS, 255)):
        decoded = to_input(data, prep, max_pixels=10_000, param="input")
        assert (decoded.input.pixels == colour).all()
