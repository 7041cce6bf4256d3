"""Types that ingress replicas and the embedder exchange.

They have a module of their own so that an ingress replica need not import the model's code, which
would double the time until the replica can answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.media.preprocessing import Preprocessing

Pooling = Literal["mean", "per_frame", "patches"]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

EmbedFunction = Callable[[Pixels, Pooling], Awaitable[Floats]]
"""Calls `Embedder.embed`, wherever that runs."""

EMBEDDER = "Embedder"
"""Name of the embedder deployment."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What an ingress replica knows about the model."""

    name: str
    created: int
    dimensions: int
    num_patches: int
    """Tokens of an image, and of each time step of a clip."""
    preprocessing: Preprocessing
    frames: int = 1
    """Frames of a full clip; 1 for an image encoder."""
    tubelet: int = 1
    """Frames in a time step."""
