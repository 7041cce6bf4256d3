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

SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)
"""Versions of the section that can be read; 1 has no background and no deep range in its
preprocessing."""


def our_section(
    encoder: VisionTransformer, preprocessing: Preprocessing, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the section `rayjepa` of config.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "encoder": dataclasses.asdict(encoder.shape),
        "preprocessing": dataclasses.asdict(preprocessing),
        "pooling": "mean",
        "provenance": dict(provenance),
    }


def _read(stored: Stored) -> Source:
    section = stored.config["rayjepa"]
    version = section.get("schema_version")
    if version not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise ValueError(f"{stored.uri}: artifact schema {version}, this code reads {known}")
    values: dict[str, Any] = dict(section["preprocessing"])
    lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return Source(
        shape=section["encoder"],
        preprocessing=Preprocessing(**values | lists),
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
