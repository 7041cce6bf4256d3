"""The one way a safetensors file is written: readable by whoever the umask lets read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes named tensors to `path`, with the mode that any other new file gets.

    safetensors writes to a temporary file of mode 600 and renames it, so that only its owner could
    read an exported model.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata)
    path.chmod(mode & 0o7777)
