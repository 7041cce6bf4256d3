"""The predictor in an artifact: it comes back as it was, and other versions are refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models.beliefs import CLIPS, GREY, HALVES, objective, patches_of, random_pixels
from models.artifacts.artifact import load_artifact, save_artifact
from models.beliefs.expectation import Expectation, Surprise
from models.beliefs.stored import FILE, load_surprise, save_surprise
from models.digests import DIGESTS
from models.media.preprocessing import Preprocessing

PREP = Preprocessing(image_size=16, **GREY)
PROVENANCE = {"run": "r", "step": 1, "manifest_hash": ""}


@pytest.fixture(params=["batch", "local"])
def surprise(request: pytest.FixtureRequest) -> Surprise:
    found = Expectation.of(objective(CLIPS, target_norm=request.param))
    measure = Surprise(found, HALVES)
    patches_BNP = patches_of(found, random_pixels(CLIPS, 6))
    found.fit([patches_BNP])
    measure.calibrate([patches_BNP])
    return measure


def saved(folder: Path, surprise: Surprise) -> str:
    encoder = surprise.expectation.target_encoder
    add = functools.partial(save_surprise, surprise=surprise)
    save_artifact(folder, encoder, PREP, PROVENANCE, add=add)
    return str(folder)


def test_surprise_is_the_same_after_it_was_stored(tmp_path: Path, surprise: Surprise) -> None:
    uri = saved(tmp_path / "a", surprise)
    artifact = load_artifact(uri)
    loaded = load_surprise(uri, artifact.encoder)
    assert loaded is not None
    patches_BNP = patches_of(surprise.expectation, random_pixels(CLIPS, 3, seed=1))
    errors_BN = surprise.errors(patches_BNP)
    assert torch.equal(loaded.errors(patches_BNP), errors_BN)
    assert torch.equal(loaded.map(errors_BN), surprise.map(errors_BN))


def test_an_artifact_without_a_predictor_has_no_surprise_and_another_fingerprint(
    tmp_path: Path, surprise: Surprise
) -> None:
    uri, plain = saved(tmp_path / "a", surprise), tmp_path / "b"
    save_artifact(plain, surprise.expectation.target_encoder, PREP, PROVENANCE)
    artifact = load_artifact(plain)
    assert load_surprise(str(plain), artifact.encoder) is None
    assert artifact.fingerprint != load_artifact(uri).fingerprint


def test_a_file_of_another_version_or_that_was_changed_is_refused(
    tmp_path: Path, surprise: Surprise
) -> None:
    uri = saved(tmp_path / "a", surprise)
    file, encoder = Path(uri) / FILE, load_artifact(uri).encoder
    tensors = load_file(file)
    save_file(tensors, file, {"rayjepa": json.dumps({"schema_version": 99})})
    with pytest.raises(ValueError, match=f"{FILE} is damaged"):
        load_surprise(uri, encoder)
    (Path(uri) / DIGESTS).unlink()
    with pytest.raises(ValueError, match="schema 99, this code reads 2"):
        load_surprise(uri, encoder)
