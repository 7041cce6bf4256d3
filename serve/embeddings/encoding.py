"""Embeddings as a client asked for them: their length, their norm, and numbers or base64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from serve.embeddings.contract import Floats
from serve.ingress.errors import server_error


def shape_embeddings(embeddings: Floats, *, dimensions: int | None, normalize: bool) -> Floats:
    """Truncates to `dimensions`, then scales to unit length: in this order, as OpenAI does.

    Args:
        embeddings: float32 [..., D].
        dimensions: how many leading ones to keep; None keeps all.
        normalize: whether to scale.

    Returns:
        float32 [..., dimensions].
    """
    embeddings = embeddings[..., :dimensions]
    if not normalize:
        return embeddings
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    unit: Floats = embeddings / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


def encode_values(values: Floats, encoding_format: str) -> str | list[Any]:
    """Numbers for JSON, or base64 of the float32 values, little-endian.

    Raises:
        ApiError: 500, some are no numbers.
    """
    if not np.isfinite(values).all():
        raise server_error(500, "not_finite", "the model's output holds NaN or infinity")
    if encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    listed: list[Any] = values.tolist()
    return listed
