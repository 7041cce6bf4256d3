"""SHA-256 digests of files, stored beside them, so that damage is found before they are used.

A file `digests.json` holds `{"sha256": {"model.safetensors": "<64 hex digits>", ...}}`. Neither
safetensors nor a file system notices a bit that has flipped in a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

DIGESTS = "digests.json"
ALGORITHM = "sha256"
CHANGED = f"is damaged: its {ALGORITHM} is not the one it had when it was saved"
"""What errors say of a file, after its name."""


class DamagedFileError(ValueError):
    """A file is not the one that was saved."""


def digest_of(path: Path) -> str:
    """Returns the digest of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, ALGORITHM).hexdigest()


def digest_of_bytes(data: bytes) -> str:
    """Returns the digest of a file that has been read already, hex."""
    return hashlib.new(ALGORITHM, data).hexdigest()


def write_digests(folder: Path, names: Iterable[str], file: str = DIGESTS) -> None:
    """Writes the digests of files of a folder into a file of the same folder."""
    digests = {name: digest_of(folder / name) for name in sorted(names)}
    (folder / file).write_text(json.dumps({ALGORITHM: digests}, indent=1) + "\n")


def parse_digests(text: str | bytes) -> dict[str, str]:
    """Returns the digests by file name from the text of `digests.json`.

    Raises:
        ValueError: The text is damaged, or of another algorithm.
    """
    try:
        return dict(json.loads(text)[ALGORITHM])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot be read: {error!r}") from error


def read_digests(folder: Path, pattern: str = DIGESTS) -> dict[str, str]:
    """Returns the digests by file name that a folder holds; none if it was saved without.

    Raises:
        DamagedFileError: A file of digests cannot be read; the message begins with its name.
    """
    digests: dict[str, str] = {}
    for path in sorted(folder.glob(pattern)):
        try:
            digests |= parse_digests(path.read_bytes())
        except ValueError as error:
            raise DamagedFileError(f"{path.name} {error}") from error
    return digests


def check_file(path: Path, digests: Mapping[str, str]) -> None:
    """Compares a file with its digest; a file without one is taken as it is.

    Raises:
        DamagedFileError: They differ; the message begins with the file's name.
    """
    expected = digests.get(path.name)
    if expected is not None and digest_of(path) != expected:
        raise DamagedFileError(f"{path.name} {CHANGED}")
