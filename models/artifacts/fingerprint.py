"""The fingerprint of an artifact: a digest of its content, equal wherever a copy of it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from models.digests import digest_of

READ = (
    "config.json",
    "*processor_config.json",
    "model*.safetensors",
    "surprise.safetensors",
)
"""Patterns of the files of a model folder that decide what it answers."""


def content_fingerprint(path: Path, checked: Mapping[str, str] | None = None) -> str:
    """Returns a digest of everything that decides what a model answers.

    Args:
        path: local folder of a model, of which the files that match `READ` count and its folders do
            not; or a checkpoint file.
        checked: digests by name of files of the folder that agree with them, which need not be read
            again.

    Returns:
        64 hexadecimal digits, from the names and the contents of the files.
    """
    total = hashlib.sha256()
    for name, file in _files(path):
        digest = (checked or {}).get(name) or digest_of(file)
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def _files(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        return [("", path)]  # whatever the file is called
    found = {file for pattern in READ for file in path.glob(pattern) if file.is_file()}
    return sorted((file.name, file) for file in found)
