"""The model that every server of the benchmark has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that every server has, and its threads."""

    preset: str = "vit_s"
    """Row of `models.encoders.shape.PRESETS`."""
    image_size: int = 224
    """Pixels on a side of the encoder's input."""
    patch_size: int = 16
    """Pixels on a side of a patch."""
    dtype: str = "bf16"
    """fp32 or bf16."""
    threads: int = 2
    """Torch threads."""
    decode_threads: int = 2
    """Threads that decode pictures."""
    batch_size: int = 32
    """Images in one forward pass at most; the bare loop's batches are always full."""
    max_wait_ms: float = 2.0
    """See `ServeSettings.max_wait_ms`."""


def settings_for(model: Model, folder: str, placement: str = "separate") -> Any:
    """Returns the settings of our endpoint."""
    from serve.embeddings.settings import ServeSettings

    return ServeSettings(
        artifact=folder,
        placement=placement,  # type: ignore[arg-type]
        dtype=model.dtype,  # type: ignore[arg-type]
        threads=model.threads,
        decode_threads=model.decode_threads,
        batch_size=model.batch_size,
        max_wait_ms=model.max_wait_ms,
    )


def forward_threads(count: int, torch_threads: int) -> ThreadPoolExecutor:
    """Returns threads for forward passes, each with its number of torch threads.

    The caller itself computes with one torch thread from then on, and so should not have computed
    before: OpenMP's threads wait for one another without sleeping only while there are no more of
    them than cores (see `serve/replicas/batch_threads.py`).
    """
    import torch

    torch.set_num_threads(1)

    def begin() -> None:
        torch.get_num_threads()  # or the first question would change the thread's own number
        torch.set_num_threads(torch_threads)

    return ThreadPoolExecutor(count, initializer=begin)
