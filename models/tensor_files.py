"""Reads and writes safetensors files, with the permissions that the umask gives to new files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

METADATA = {"format": "pt"}
"""Metadata of a model's safetensors file; transformers refuses files without it."""


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes named tensors to `path`, with the permissions that the umask gives to new files.

    safetensors by itself writes a temporary file of mode 600 and renames it, so that only the owner
    could read an exported model.

    Args:
        tensors: tensors by name, on any device.
        path: file to write; an existing file is replaced.
        metadata: stored in the header of the file.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata)
    path.chmod(mode & 0o7777)


def detached(module: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a module as contiguous fp32 tensors on the CPU."""
    return {k: v.detach().float().cpu().contiguous() for k, v in module.state_dict().items()}


def read_tensors(folder: Path, source: str) -> dict[str, Tensor]:
    """Reads all `model*.safetensors` files of a model folder, sharded or not.

    Args:
        folder: the model folder.
        source: where the model came from, for the error message.

    Raises:
        ValueError: the folder holds no such file.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{source}: no model.safetensors")
    return {k: v for file in files for k, v in load_file(file).items()}
