"""The interface of an encoder format: what it provides, reads and writes.

To add a format, write a module with a `Format` and enter it in `models.artifacts.artifact.FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from models.encoders.blocks import LN_EPS
from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A folder or file that may hold an encoder."""

    path: Path
    """Local; a copy if the encoder is remote."""
    config: Mapping[str, Any]
    """The folder's config.json; empty where there is none."""
    uri: str
    """What the user gave, for error messages."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests by name of files that agree with them; see `models.digests`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was read from disk: enough to build our encoder or predictor."""

    shape: dict[str, Any]
    """Arguments of `VisionTransformer` (or of `Predictor`, for `read_predictor`)."""
    preprocessing: Preprocessing
    state: dict[str, Tensor]
    """Weights under our names."""
    layer_norm_eps: float = LN_EPS
    section: dict[str, Any] | None = None
    """The section `rayjepa` of config.json, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is written to disk."""

    encoder: VisionTransformer
    preprocessing: Preprocessing
    provenance: Mapping[str, Any]
    predictor: Predictor | None


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table of formats."""

    name: str
    """Its common name."""
    recognises: Callable[[Stored], bool]
    """Whether `read` can be tried on this folder or file."""
    read: Callable[[Stored], Source]
    """Reads the encoder. Raises a ValueError if our encoder cannot compute the same."""
    read_predictor: Callable[[Stored], Source] | None = None
    """Reads the predictor, if the format can hold one. Raises like `read`."""
    can_write: Callable[[VisionTransformer], bool] = lambda encoder: False
    """Whether the format has a form for this encoder."""
    write: Callable[[Path, Export], None] | None = None
    """Writes its files into the artifact's folder, which exists; None if it is only read."""
    limits: Callable[[Export], list[str]] = lambda export: []
    """Says, a sentence each, what of an export the format cannot hold."""


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")
