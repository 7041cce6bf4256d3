"""Types that ingress replicas and the embedder exchange.

They have a module of their own so that an ingress replica need not import the model's code, which
would double the time until the replica can answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.media.preprocessing import EncoderInput, Preprocessing
from models.media.regions import Region
from serve.ingress.errors import ApiError

Pooling = Literal["mean", "per_frame", "patches", "surprise"]
How = Literal["mean", "covariance", "paired"]
"""As in `models.artifacts.alignment`, which would import the model's code."""
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

EmbedFunction = Callable[[Sequence[EncoderInput], Pooling, "ModelCard"], Awaitable[list[Floats]]]
"""Calls `Embedder.embed`, wherever that runs, for inputs that were prepared by a card.

It raises `serve.replicas.calls.OtherModel` if no replica is found that serves this card's model.
"""

EMBEDDER = "Embedder"
"""Name of the embedder deployment."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What an ingress replica knows about a model.

    It comes from the artifact when the application is built. So all replicas of one deployment have
    the same one, whatever other replicas run beside them during an update.
    """

    name: str
    fingerprint: str = ""
    """Digest of the artifact's content and of everything else that changes vectors or the model's
    name. Calls of the embedder name it, and an embedder refuses any but its own."""
    dimensions: int
    num_patches: int
    """Tokens of an image, and of each time step of a clip, where the whole grid is encoded."""
    grid: tuple[int, int]
    """Rows and columns of the encoder's grid."""
    preprocessing: Preprocessing
    frames: int = 1
    """Frames of a full clip; 1 for an image encoder."""
    tubelet: int = 1
    """Frames in a time step."""
    alignment: How | None = None
    """How the map in front of the embeddings was fitted; None without one."""
    surprise: bool = False
    """Whether the predictor was exported, so that the pooling `surprise` can be answered."""

    def transform(self, exclude: tuple[Region, ...] | None) -> Preprocessing:
        """Returns the transform with other regions left out; None keeps the artifact's.

        Raises:
            ApiError: 400, the features would not be those that the alignment is for.
        """
        if exclude is None or exclude == self.preprocessing.exclude:
            return self.preprocessing
        if self.alignment is not None:
            message = (
                "features are aligned for the artifact's own regions; leave exclude out, or ask a "
                "server without `align`"
            )
            raise ApiError(400, "invalid_value", message, param="exclude")
        return dataclasses.replace(self.preprocessing, exclude=exclude)


@dataclass(frozen=True, eq=False)
class Decoded:
    """A picture, or frames of one video, decoded and fitted to the model."""

    input: EncoderInput
    size: tuple[int, int]
    """Height and width before that, pixels."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return self.input.pixels.nbytes
