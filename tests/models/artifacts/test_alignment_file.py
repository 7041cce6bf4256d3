"""The file of an alignment: read as written, and refused for features that it is not for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from models.artifacts.alignment import Alignment, Origin, alignment_bytes, load_alignment
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing

PREP = Preprocessing(
    image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), exclude=((0.0, 0.0, 1.0, 0.1),)
)
CLIP = {"fps": None, "stride": 2}


def encoder(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(EncoderShape(image_size=32, patch_size=8, width=24, depth=1, heads=3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weight_DD, bias_D = rng.normal(size=(24, 24)), rng.normal(size=24)
    origin = Origin.of(
        encoder(0), PREP, how="mean", name="games", clip=CLIP, samples={"old": 7, "new": 5}
    )
    path = tmp_path / "map.safetensors"
    alignment = Alignment(weight_DD.astype(np.float32), bias_D.astype(np.float32))
    path.write_bytes(alignment_bytes(alignment, origin))
    return path


def test_a_file_maps_features_and_tokens_as_other_readers_would(file: Path) -> None:
    stored = load_alignment(str(file))
    tensors = safetensors.numpy.load_file(file)
    tokens_NTD = np.random.default_rng(1).normal(size=(3, 5, 24)).astype(np.float32)
    expected = np.einsum("ntd,de->nte", tokens_NTD, tensors["weight"]) + tensors["bias"]
    np.testing.assert_allclose(stored.alignment(tokens_NTD), expected, atol=1e-5)
    assert stored.alignment(tokens_NTD.astype(np.float16)).dtype == np.float16
    assert (stored.origin.how, stored.origin.name) == ("mean", "games")
    assert stored.origin.samples == {"old": 7, "new": 5}


def test_it_is_for_one_encoder_fit_set_of_regions_and_kind_of_clip(file: Path) -> None:
    stored = load_alignment(str(file))
    stored.check(encoder(0), PREP)
    stored.check(encoder(0), dataclasses.replace(PREP, background=(9, 9, 9)))
    stored.check_clips(CLIP)
    for what, one, prep in (
        ("weights", encoder(1), PREP),
        ("fit", encoder(0), dataclasses.replace(PREP, fit="pad")),
        ("exclude", encoder(0), dataclasses.replace(PREP, exclude=())),
        ("exclude", encoder(0), dataclasses.replace(PREP, exclude=((0.0, 0.0, 1.0, 0.2),))),
    ):
        with pytest.raises(ValueError, match=f"those of games:\n{what} ") as refused:
            stored.check(one, prep)
        assert str(refused.value).startswith(str(file))
        assert len(str(refused.value).splitlines()) == 3
    for clip in (None, {"fps": None, "stride": 1}):
        with pytest.raises(ValueError, match=re.escape(f"{CLIP} there, {clip} here")):
            stored.check_clips(clip)


def test_other_files_are_no_alignments(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    tensors = safetensors.numpy.load(whole)
    for content in (b"", b"no header", whole[:-8], safetensors.numpy.save({"bias": np.ones(3)})):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match="is no alignment"):
            load_alignment(str(tmp_path / "other"))
    (tmp_path / "old").write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(ValueError, match="does not say whose features it is for"):
        load_alignment(str(tmp_path / "old"))
    with pytest.raises(FileNotFoundError):
        load_alignment(str(tmp_path / "nothing"))
