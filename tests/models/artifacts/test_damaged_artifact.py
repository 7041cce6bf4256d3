"""Artifacts with a bit flipped: refused, and the file is named by its URI."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from models import digests
from models.artifacts import fingerprint
from models.artifacts.artifact import load_artifact, load_predictor, save_artifact
from models.digests import digest_of
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing

PREP = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.2,) * 3)
SHAPE = {"image_size": 16, "patch_size": 8, "width": 24, "depth": 1, "heads": 3}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "artifact", VisionTransformer(EncoderShape(**SHAPE)), PREP, {})
    return tmp_path / "artifact"


def flip(path: Path, place: int) -> None:
    """Flips the lowest bit of a byte; the file stays a valid one if it is a tensor's."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "digests.json"])
def test_a_flipped_bit_is_refused(artifact: Path, name: str) -> None:
    load_artifact(artifact)
    flip(artifact / name, -5)
    with pytest.raises(ValueError, match="Export the artifact again") as caught:
        load_artifact(artifact)
    assert str(caught.value).startswith(f"{artifact}/{name} ")
    assert str(caught.value).count("\n") == 1


def test_the_model_for_transformers_is_protected_as_well(artifact: Path) -> None:
    folder = artifact / "transformers"
    load_artifact(folder)
    flip(folder / "model.safetensors", -1)
    load_artifact(artifact)  # which does not read that
    for load in (load_artifact, load_predictor):
        with pytest.raises(ValueError, match=r"transformers/model\.safetensors is damaged"):
            load(folder)


def test_a_damaged_remote_artifact_is_named_by_its_uri(artifact: Path) -> None:
    flip(artifact / "model.safetensors", -1)
    fsspec.filesystem("memory").put(str(artifact), "/damaged/artifact", recursive=True)
    with pytest.raises(ValueError, match="is damaged") as caught:
        load_artifact("memory://damaged/artifact")
    assert str(caught.value).startswith("memory://damaged/artifact/model.safetensors is damaged")


def test_artifacts_without_digests_load_as_they_are(artifact: Path) -> None:
    (artifact / "digests.json").unlink()
    flip(artifact / "model.safetensors", -1)  # unnoticed, as it was before there were digests
    load_artifact(artifact)


def test_digests_are_those_of_sha256sum(artifact: Path, tmp_path: Path) -> None:
    written = json.loads((artifact / "digests.json").read_text())["sha256"]
    assert written.keys() == {"config.json", "model.safetensors"}
    (tmp_path / "abc").write_bytes(b"abc")  # the first example of FIPS 180-2
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_of(tmp_path / "abc") == known


def test_the_fingerprint_costs_no_second_reading_and_needs_no_digests(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return digest_of(path)

    monkeypatch.setattr(digests, "digest_of", counted)
    monkeypatch.setattr(fingerprint, "digest_of", counted)
    with_digests = load_artifact(artifact).fingerprint
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    (artifact / "digests.json").unlink()
    assert load_artifact(artifact).fingerprint == with_digests
    assert len(hashed) == 4
