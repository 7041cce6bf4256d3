"""Reading and writing safetensors files, which get the mode that any other new file gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

METADATA = {"format": "pt"}
"""Of a model's file; transformers refuses a file without it."""


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes named tensors to `path`, readable by whoever the umask lets read.

    safetensors alone would write a temporary file of mode 600 and rename it, so that only its owner
    could read an exported model.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata)
    path.chmod(mode & 0o7777)


def detached(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's weights as contiguous fp32 tensors on the CPU."""
    return {k: v.detach().float().cpu().contiguous() for k, v in module.state_dict().items()}


def read_tensors(folder: Path, source: str) -> dict[str, Tensor]:
    """Reads a model folder's safetensors, sharded or not.

    Raises:
        ValueError: there are none; `source` is named.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{source}: no model.safetensors")
    return {k: v for file in files for k, v in load_file(file).items()}
