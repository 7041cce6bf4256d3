"""Our own format: weights under timm's names, and the section `rayjepa` of config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.artifacts.formats.format import Export, Format, Source, Stored, write_json
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from models.tensor_files import METADATA, detached, read_tensors, save_tensors

SCHEMA_VERSION = 3
READABLE = (1, 2, SCHEMA_VERSION)
"""Versions of the section that can be read. In its preprocessing, 2 has neither fit nor regions
left out, and 1 has no background and no deep range either."""


def our_section(
    encoder: VisionTransformer, preprocessing: Preprocessing, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the section `rayjepa` of config.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "encoder": dataclasses.asdict(encoder.shape),
        "preprocessing": stored_preprocessing(preprocessing),
        "pooling": "mean",
        "provenance": dict(provenance),
    }


def stored_preprocessing(prep: Preprocessing) -> dict[str, Any]:
    """Returns the preprocessing as it is stored: the size of a patch stands with the encoder."""
    return {k: v for k, v in dataclasses.asdict(prep).items() if k != "patch_size"}


def _read(stored: Stored) -> Source:
    section = stored.config["rayjepa"]
    version = section.get("schema_version")
    if version not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise ValueError(f"{stored.uri}: artifact schema {version}, this code reads {known}")
    return Source(
        shape=section["encoder"],
        preprocessing=Preprocessing(**section["preprocessing"]),
        state=read_tensors(stored.path, stored.uri),
        section=section,
    )


def _write(folder: Path, export: Export) -> None:
    save_tensors(detached(export.encoder), folder / "model.safetensors", METADATA)
    section = our_section(export.encoder, export.preprocessing, export.provenance)
    write_json(folder / "config.json", {"rayjepa": section})


RAYJEPA = Format(
    name="rayjepa artifact",
    recognises=lambda stored: "rayjepa" in stored.config,
    read=_read,
    can_write=lambda encoder: True,
    write=_write,
)
