"""The encoder's replica on a GPU that is not there: all of it there, and few waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.fake_device import WAITS, Watch, fake, fake_gpu, put
from helpers.serve.embeddings import WIDTH, save_fitted_artifact
from models.encoders.kept_tokens import KeptTokens
from models.media.fit import Fit
from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import Pooling
from serve.embeddings.replica.embedder import Encoder
from serve.embeddings.settings import ServeSettings

MIXED: list[Pooling] = ["mean", "patches", "per_frame", "mean"]
ROWS, COLUMNS = 4, 6


@contextlib.contextmanager
def on_gpu(folder: Path, *, fit: Fit = "squash", frames: int = 1, **more: Any) -> Iterator[Encoder]:
    """An encoder with fake weights on the fake GPU."""
    tubelet, size = 2 if frames > 1 else 1, (8 * ROWS, 8 * COLUMNS)
    save_fitted_artifact(folder, fit, size, frames=frames, tubelet=tubelet, patch_size=8)
    encoder = Encoder(ServeSettings(artifact=str(folder), threads=1, **more))
    with fake_gpu():
        put(encoder._encoder)
        yield encoder


def run(encoder: Encoder, one: EncoderInput, poolings: list[Pooling], back: int) -> list[Any]:
    """Runs a batch of one input, whose results may be copied to the host so many times."""
    numbers = mock.patch.object(Tensor, "numpy", lambda values: np.zeros(tuple(values.shape)))
    with Watch(copies_back=back), numbers:
        return encoder.run([(one, pooling) for pooling in poolings])


def picture(frames: int = 1) -> EncoderInput:
    time = (frames,) if frames > 1 else ()
    return EncoderInput(np.zeros((*time, 8 * ROWS, 8 * COLUMNS, 3), np.uint8))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("frames", [1, 4])
def test_a_batch_waits_once_for_means_and_once_for_tokens(
    tmp_path: Path, frames: int, dtype: str
) -> None:
    steps = max(1, frames // 2)
    tokens = steps * ROWS * COLUMNS
    with on_gpu(tmp_path, frames=frames, dtype=dtype) as encoder:
        means = run(encoder, picture(frames), ["mean"] * 3, back=1)
        mixed = run(encoder, picture(frames), MIXED, back=2)
    assert [mean.shape for mean in means] == [(WIDTH,)] * 3
    assert [each.shape for each in mixed] == [(WIDTH,), (tokens, WIDTH), (steps, WIDTH), (WIDTH,)]


def test_tokens_that_pictures_lack_are_counted_before_they_are_moved(tmp_path: Path) -> None:
    def of_mask(grids_B2: Tensor, kept_BM: Tensor, tubes: int) -> KeptTokens:
        assert {grids_B2.device.type, kept_BM.device.type} == {"cpu"}
        ids_BK = torch.zeros(len(kept_BM), 23, dtype=torch.int64)
        return KeptTokens(grids_B2, ids_BK, ids_BK == 0)

    counting = mock.patch.object(KeptTokens, "of_mask", of_mask)
    with on_gpu(tmp_path, fit="whole") as encoder, counting:
        assert len(run(encoder, picture(), ["mean"] * 2, back=1)) == 2


def test_another_wait_is_found(tmp_path: Path) -> None:
    with on_gpu(tmp_path) as encoder, pytest.raises(WAITS):
        run(encoder, picture(), ["mean"] * 2, back=0)


def test_a_weight_that_stays_behind_is_found(tmp_path: Path) -> None:
    with on_gpu(tmp_path) as encoder:
        norm = encoder._encoder.norm
        norm.weight = nn.Parameter(fake(norm.weight))
        with pytest.raises(RuntimeError, match="device"):
            run(encoder, picture(), ["mean"], back=9)
