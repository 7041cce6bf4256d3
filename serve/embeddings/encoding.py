"""How embeddings leave the server: what clients may ask for, and the JSON that they get."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np

from models.media.regions import Bools
from serve.embeddings.contract import Floats, Pooling
from serve.ingress.bodies import RequestModel
from serve.ingress.errors import server_error


class OutputOptions(RequestModel):
    """Fields of `POST /v1/embeddings` and of a stream's start that say what to return."""

    encoding_format: Literal["float", "base64"] = "float"
    """JSON numbers, or the float32 values little-endian in base64."""
    dimensions: int | None = None
    """Keep this many leading dimensions, then scale to unit length again."""
    pooling: Pooling = "mean"
    """One vector for each item, for each time step of its tokens, or for each token (by time, then
    in raster order)."""
    normalize: bool = True
    """Scale every vector to unit length, as OpenAI's are."""


def encode(
    embedding: Floats, options: OutputOptions, kept: Bools | None, grid: tuple[int, int]
) -> dict[str, Any]:
    """Returns the fields of a reply that hold one item's embedding.

    Args:
        embedding: float32 [D] for the pooling `mean`, else [steps or tokens, D].
        options: what the client asked for.
        kept: which patches were encoded, by rows and columns; None for all of `grid`.
        grid: rows and columns of the model's grid.

    Raises:
        ApiError: 500, some values are no numbers.
    """
    shaped = shape_embeddings(embedding, options)
    entry: dict[str, Any] = {"embedding": encode_values(shaped, options.encoding_format)}
    if options.pooling != "mean":
        entry["shape"] = list(shaped.shape)
    if options.pooling == "patches":
        entry["grid"] = list(grid if kept is None else kept.shape)
        if kept is not None and not kept.all():
            entry["kept"] = np.flatnonzero(kept).tolist()
    return entry


def shape_embeddings(embeddings: Floats, options: OutputOptions) -> Floats:
    """Truncates to `dimensions`, then scales to unit length: in this order, as OpenAI does.

    Args:
        embeddings: float32 [..., D].
        options: what the client asked for.

    Returns:
        float32 [..., dimensions].
    """
    embeddings = embeddings[..., : options.dimensions]
    if not options.normalize:
        return embeddings
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    unit: Floats = embeddings / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


def encode_values(values: Floats, encoding_format: str) -> str | list[Any]:
    """Returns numbers for JSON, or base64 of the float32 values, little-endian.

    Raises:
        ApiError: 500, some are no numbers.
    """
    if not np.isfinite(values).all():
        raise server_error(500, "not_finite", "the model's output holds NaN or infinity")
    if encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    listed: list[Any] = values.tolist()
    return listed
