"""An affine map in front of old probes: features that have moved, brought back to where they were.

`alignment.safetensors` holds `weight` [D, D] and `bias` [D], and in the header's metadata, as JSON
under `rayjepa`, the `Origin`: whose features the map is for. It is refused for any others.

Shape suffixes: D feature width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from models.artifacts.artifact import weights_hash
from models.encoders.vit import VisionTransformer
from models.file_systems import read_bytes
from models.media.preprocessing import Preprocessing

SCHEMA_VERSION = 1
METADATA_KEY = "rayjepa"
How = Literal["mean", "covariance", "paired"]


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Maps features [..., D] to `features @ weight + bias`.

    The mean over tokens and an affine map commute, so it applies to tokens and to pooled features,
    before they are normalised.
    """

    weight_DD: np.ndarray
    bias_D: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Maps features or tokens [..., D]; the dtype stays."""
        mapped: np.ndarray = features.astype(np.float32) @ self.weight_DD + self.bias_D
        return mapped.astype(features.dtype)

    @property
    def hash(self) -> str:
        """32 hex digits of a hash of the map."""
        digest = hashlib.blake2b(digest_size=16)
        for values in (self.weight_DD, self.bias_D):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose features an alignment is for, and what it was fitted to."""

    how: How
    """`mean` or `covariance` of unpaired footage by one encoder, or `paired`: the same samples by
    an adapted encoder and by the old one."""
    encoder: str
    """`weights_hash` of the encoder whose features are mapped."""
    name: str
    """The run or artifact that it comes from, for people."""
    fit: str
    """How pictures were fitted to its input."""
    exclude: tuple[tuple[float, ...], ...]
    """Regions of the pictures that were left out."""
    clip: dict[str, Any] | None
    """`fps` and `stride` of clips; None for images."""
    samples: dict[str, int]
    """Samples that it was fitted to, by kind of footage."""

    @staticmethod
    def of(
        encoder: VisionTransformer,
        prep: Preprocessing,
        *,
        how: How,
        name: str,
        clip: dict[str, Any] | None,
        samples: dict[str, int],
    ) -> Origin:
        """Describes features of an encoder under a transform."""
        return Origin(
            how=how,
            encoder=weights_hash(encoder),
            name=name,
            fit=prep.fit,
            exclude=_as_tuples(prep.exclude),
            clip=clip,
            samples=samples,
        )


@dataclasses.dataclass(frozen=True)
class StoredAlignment:
    """An alignment as a file holds it."""

    uri: str
    alignment: Alignment
    origin: Origin

    def check(self, encoder: VisionTransformer, prep: Preprocessing) -> None:
        """Raises a ValueError unless the map is for these features, and names what differs."""
        for what, theirs, ours in (
            ("weights", self.origin.encoder, weights_hash(encoder)),
            ("fit", self.origin.fit, prep.fit),
            ("exclude", list(self.origin.exclude), list(_as_tuples(prep.exclude))),
        ):
            self._require_equal(what, theirs, ours)

    def check_clips(self, clip: dict[str, Any] | None) -> None:
        """Raises a ValueError unless the map is for clips with such frames, or for images."""
        self._require_equal("frames of clips", self.origin.clip, clip)

    def _require_equal(self, what: str, theirs: Any, ours: Any) -> None:
        if theirs != ours:
            raise ValueError(
                f"{self.uri} is for other features, those of {self.origin.name}:\n"
                f"{what} {theirs} there, {ours} here\n"
                "Use the settings of the file, or make it anew with python -m pipelines.align."
            )


def alignment_bytes(alignment: Alignment, origin: Origin) -> bytes:
    """Returns the content of an alignment's file."""
    tensors = {"weight": alignment.weight_DD, "bias": alignment.bias_D}
    stored = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(origin)}
    return safetensors.numpy.save(tensors, {METADATA_KEY: json.dumps(stored)})


def load_alignment(uri: str) -> StoredAlignment:
    """Reads an alignment of `pipelines.align` or `pipelines.adapt`.

    Args:
        uri: local or `s3://` file.

    Raises:
        FileNotFoundError: there is nothing at the URI.
        ValueError: it is no alignment, or one of an older version, without its origin.
    """
    data = read_bytes(uri)
    try:
        tensors, header = safetensors.numpy.load(data), _header(data)
        alignment = Alignment(tensors["weight"], tensors["bias"])
    except (safetensors.SafetensorError, KeyError) as error:
        advice = "python -m pipelines.align writes one"
        raise ValueError(f"{uri} is no alignment; {advice}") from error
    stored = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
    if stored.pop("schema_version", None) != SCHEMA_VERSION:
        raise ValueError(
            f"{uri} does not say whose features it is for, as an older version wrote it\n"
            "Make it anew: pipelines.adapt of a finished run only compares and writes."
        )
    return StoredAlignment(
        uri, alignment, Origin(**stored | {"exclude": _as_tuples(stored["exclude"])})
    )


def _header(data: bytes) -> dict[str, Any]:
    """Reads the header of safetensors: its length in eight bytes, then JSON."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def _as_tuples(regions: Any) -> tuple[tuple[float, ...], ...]:
    """Returns regions as tuples, which JSON stores as lists."""
    return tuple(tuple(region) for region in regions)
