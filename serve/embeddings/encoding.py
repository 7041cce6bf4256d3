"""How embeddings leave the server: what clients may ask for, and the JSON that they get."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from models.media.regions import Bools, Region
from serve.embeddings.contract import Floats, ModelCard, Pooling
from serve.ingress.bodies import RequestModel
from serve.ingress.errors import ApiError, server_error


class OutputOptions(RequestModel):
    """Fields of `POST /v1/embeddings` and of a stream's start that say what to return."""

    encoding_format: Literal["float", "base64"] = "float"
    """JSON numbers, or the float32 values little-endian in base64."""
    dimensions: int | None = None
    """Keep this many leading dimensions, then scale to unit length again."""
    pooling: Pooling = "mean"
    """One vector for each item, for each time step of its tokens, or for each token (by time, then
    in raster order); or, for `surprise`, one number for each token: how wrong the predictor is
    there, as a multiple of how wrong it usually is."""
    normalize: bool = True
    """Scale every vector to unit length, as OpenAI's are."""


def check_output(options: OutputOptions, regions: Sequence[Region] | None, card: ModelCard) -> None:
    """Raises a 400 if a model cannot answer what a client asks for.

    Args:
        options: what the client asked for.
        regions: those that the client leaves out; None for the artifact's.
        card: the model.
    """
    dimensions, width = options.dimensions, card.dimensions
    if dimensions is not None and not 1 <= dimensions <= width:
        message = f"dimensions must lie between 1 and {width}, got {dimensions}"
        raise ApiError(400, "invalid_value", message, param="dimensions")
    if options.pooling != "surprise":
        return
    if not card.surprise:
        message = (
            f"the model {card.name!r} has no predictor to be surprised; it is exported with one by "
            "--surprise own or future"
        )
        raise ApiError(400, "invalid_value", message, param="pooling")
    if dimensions is not None:
        message = "pooling surprise has one number for each token; leave dimensions out"
        raise ApiError(400, "invalid_value", message, param="dimensions")
    if regions:
        message = "pooling surprise is told of the whole picture; leave exclude out"
        raise ApiError(400, "invalid_value", message, param="exclude")


def encode(
    embedding: Floats, options: OutputOptions, kept: Bools | None, grid: tuple[int, int]
) -> dict[str, Any]:
    """Returns the fields of a reply that hold one item's embedding.

    Args:
        embedding: float32 [D] for the pooling `mean`, [steps or tokens, D] for `per_frame` and
            `patches`, and for `surprise` [steps, 1 + patches]: first the whole time step's.
        options: what the client asked for.
        kept: which patches were encoded, by rows and columns; None for all of `grid`.
        grid: rows and columns of the model's grid.

    Raises:
        ApiError: 500, some values are no numbers.
    """
    if options.pooling == "surprise":
        steps_S, map_SN = embedding[:, 0], embedding[:, 1:]
        return {
            "embedding": encode_values(map_SN, options.encoding_format),
            "shape": list(map_SN.shape),
            "grid": list(grid),
            "surprise": encode_values(steps_S, "float"),
        }
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
