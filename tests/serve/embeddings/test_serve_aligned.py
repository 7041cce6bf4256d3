"""An endpoint whose features are aligned, through a real server."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest

from helpers.serve.embeddings import (
    WIDTH,
    direct_tokens,
    encoded,
    picture,
    png_uri,
    save_fitted_artifact,
    unit,
)
from helpers.serve.videos import local_server
from models.artifacts.alignment import Alignment, Origin, alignment_bytes
from models.artifacts.artifact import load_artifact
from serve.embeddings.replica.embedder import Encoder
from serve.embeddings.settings import ServeSettings


def write_map(folder: Path, file: Path) -> Alignment:
    """Writes a map with large random weights for the features of an artifact."""
    rng = np.random.default_rng(0)
    weight_DD, bias_D = rng.normal(size=(WIDTH, WIDTH)), rng.normal(size=WIDTH)
    alignment = Alignment(weight_DD.astype(np.float32), bias_D.astype(np.float32))
    artifact = load_artifact(folder)
    origin = Origin.of(
        artifact.encoder,
        artifact.preprocessing,
        how="covariance",
        name="r",
        clip=None,
        samples={"old": 9, "new": 9},
    )
    file.write_bytes(alignment_bytes(alignment, origin))
    return alignment


def test_features_are_mapped_before_they_are_normalised(tmp_path: Path) -> None:
    folder, file = save_fitted_artifact(tmp_path / "a", "crop", 32), tmp_path / "map.safetensors"
    alignment = write_map(folder, file)
    tokens_ND = direct_tokens(folder, encoded(picture(3)))
    mapped_ND = tokens_ND @ alignment.weight_DD + alignment.bias_D
    with local_server(folder, align=str(file)) as server:

        def post(**body: object) -> httpx.Response:
            url = f"{server.url}/v1/embeddings"
            return httpx.post(url, json={"input": png_uri(3), **body}, timeout=60)

        (pooled,) = post().json()["data"]
        (patches,) = post(pooling="patches", normalize=False).json()["data"]
        model = httpx.get(f"{server.url}/v1/models").json()["data"][0]
        same, other = post(exclude=[]), post(exclude=[[0.0, 0.0, 0.2, 0.2]])
    np.testing.assert_allclose(pooled["embedding"], unit(mapped_ND.mean(0)), atol=1e-5)
    np.testing.assert_allclose(
        np.reshape(patches["embedding"], mapped_ND.shape), mapped_ND, atol=1e-3
    )
    assert model["alignment"] == "covariance"
    assert same.json()["data"][0] == pooled
    assert (other.status_code, other.json()["error"]["param"]) == (400, "exclude")
    assert "aligned for the artifact's own regions" in other.json()["error"]["message"]


def test_a_map_for_other_features_does_not_start(tmp_path: Path) -> None:
    first = save_fitted_artifact(tmp_path / "a", "crop", 32)
    second = save_fitted_artifact(tmp_path / "b", "pad", 32)
    write_map(first, tmp_path / "map.safetensors")
    settings = ServeSettings(artifact=str(first), threads=1)
    assert Encoder(settings).card.alignment is None
    aligned = settings.model_copy(update={"align": str(tmp_path / "map.safetensors")})
    assert Encoder(aligned).card.alignment == "covariance"
    with pytest.raises(ValueError, match="is for other features"):
        Encoder(aligned.model_copy(update={"artifact": str(second)}))
