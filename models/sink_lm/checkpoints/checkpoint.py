"""An open checkpoint under Hugging Face's names, and the one that lies in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from models.sink_lm.checkpoints.location import errors_name, read_config, read_json
from models.sink_lm.network.config import LMConfig, UnsupportedModel, config_from_hf

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors that are read one by one."""

    cfg: LMConfig
    """The decoder they belong to."""
    shapes: Mapping[str, Shape]
    """Every tensor's shape by name."""
    read: Callable[[str], Tensor]
    """Reads one tensor."""


def open_folder(folder: Path, stack: ExitStack) -> Checkpoint:
    """Opens the safetensors of a folder, sharded or not, for as long as `stack` is open.

    Raises:
        FileNotFoundError: names the file that is missing.
        UnsupportedModel: names the file and what cannot stream.
        ValueError: names the file that is damaged.
    """
    config = read_config(folder)
    with errors_name(folder / "config.json"):
        cfg = config_from_hf(config)
        if config.get("quantization_config"):
            raise UnsupportedModel("quantization_config: quantised weights are read from GGUF only")
    files: dict[str, Any] = {}
    for path in _safetensors(folder):
        with errors_name(path):
            opened: AbstractContextManager[Any] = safe_open(path, framework="pt")
            file = stack.enter_context(opened)
            files |= dict.fromkeys(file.keys(), file)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
    return Checkpoint(cfg=cfg, shapes=shapes, read=lambda name: files[name].get_tensor(name))


def _safetensors(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        found = read_json(index)
        with errors_name(index):
            names = sorted(set(found["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            pickles = "; .bin and .pt files are not read, because reading them can run code"
            other = pickles if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) else ""
            raise FileNotFoundError(f"{folder / name}: no such file{other}")
    return [folder / name for name in names]
