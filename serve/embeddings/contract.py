"""What passes between the ingress and the embedder.

Apart from both, so that an ingress replica does not import the model code: that would double the
time until it answers.
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
    """What the ingress needs to know about the model behind it."""

    name: str
    created: int
    dimensions: int
    num_patches: int
    """Tokens of an image, and of a clip at each time step."""
    preprocessing: Preprocessing
    frames: int = 1
    """Frames of a full clip; 1 for an encoder of images."""
    tubelet: int = 1
    """Frames in a time step."""
