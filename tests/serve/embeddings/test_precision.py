"""A replica that computes in bfloat16 answers as one in float32, by the attention that is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from timm.layers.attention import Attention

from helpers.serve.embeddings import picture, save_fitted_artifact
from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import Floats
from serve.embeddings.replica import embedder
from serve.embeddings.settings import ServeSettings

PICTURES = [EncoderInput(np.asarray(picture(seed, (32, 32)))) for seed in range(3)]


def replica(folder: Path, dtype: Literal["fp32", "bf16"]) -> embedder.Encoder:
    return embedder.Encoder(ServeSettings(artifact=str(folder), dtype=dtype))


def fused(encoder: embedder.Encoder) -> set[bool]:
    """Whether its layers take the fused kernel."""
    parts = encoder._encoder.modules()
    return {part.fused_attn for part in parts if isinstance(part, Attention)}


def means(encoder: embedder.Encoder) -> list[Floats]:
    return encoder.run([(one, "mean") for one in PICTURES])


def test_bfloat16_answers_as_float32(tmp_path: Path) -> None:
    folder = save_fitted_artifact(tmp_path, "squash", 32)
    exact, rounded = replica(folder, "fp32"), replica(folder, "bf16")
    assert (fused(exact), fused(rounded)) == ({True}, {False})
    for one, other in zip(means(rounded), means(exact), strict=True):
        np.testing.assert_allclose(one, other, atol=0.03)
        assert np.abs(one - other).max() > 1e-5  # control: it is another precision


def test_many_tokens_take_the_kernel_that_needs_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_fitted_artifact(tmp_path, "squash", 32, frames=4, tubelet=2)
    monkeypatch.setattr(embedder, "MOST_PLAIN_TOKENS", 32)  # two time steps of 16 patches
    assert fused(replica(folder, "bf16")) == {False}
    monkeypatch.setattr(embedder, "MOST_PLAIN_TOKENS", 31)
    assert fused(replica(folder, "bf16")) == {True}
