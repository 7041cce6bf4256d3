"""Finding a model's files, reading its JSON, and opening a folder of safetensors.

A model lies in a Hugging Face folder, on the hub, or in a GGUF file (gguf_file.py). Errors name the
file that is missing, damaged or of a kind that cannot stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.sink_lm.network.config import LMConfig, UnsupportedModel, config_from_hf
from models.sink_lm.network.int4 import Grid

Shape = tuple[int, ...]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Code is left behind, and so are the formats that run code when read.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
LFS_POINTER = b"version https://git-lfs"
# What parsers raise when a file breaks off, is of another kind, or holds the wrong kind of value.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
)


def locate(path: str) -> Path:
    """Returns the folder with `config.json`, or the `.gguf` file, that `path` names.

    Args:
        path: a folder, a `.gguf` file or a folder that holds exactly one. If there is no such path,
            a hub id `org/name`, which is downloaded once and then read from the hub's cache.

    Raises:
        FileNotFoundError: there is no such path, or no model in it.
    """
    found = Path(path).expanduser()
    if not found.exists():
        if not HUB_ID.fullmatch(path):
            raise FileNotFoundError(f"{path}: no such file or folder, and not a hub id (org/name)")
        found = _download(path)
    if found.is_file() or (found / "config.json").is_file():
        return found
    files = sorted(found.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"{path}: no config.json, and {len(files)} .gguf files, not one")
    return files[0]


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id}: no such folder here, and the hub did not give it: {error}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json`, and the end tokens from `generation_config.json`, which names all."""
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        ends = read_json(generation).get("eos_token_id")
        if ends is not None:
            config["eos_token_id"] = ends
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: the file holds no JSON object; names the file.
    """
    with errors_name(path):
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"holds a JSON {type(found).__name__}, not an object")
        return found


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Turns errors from a damaged or unknown file at `path` into errors that name the file.

    Raises:
        UnsupportedModel: what was raised was one.
        ValueError: for every other error that `DAMAGE` lists.
    """
    try:
        yield
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    except DAMAGE as error:
        raise ValueError(f"{path}: {_explained(error, path)}") from error


def _explained(error: BaseException, path: Path) -> str:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "only a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if isinstance(error, KeyError):
        return f"gives no {error}"
    plain = type(error) is ValueError
    return str(error) if plain else f"damaged or cut off ({type(error).__name__}: {error})"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint, under Hugging Face's tensor names; tensors are read one by one."""

    cfg: LMConfig
    """The decoder they belong to."""
    shapes: Mapping[str, Shape]
    """Every tensor's shape by name."""
    read: Callable[[str], Tensor]
    """Reads one tensor."""
    read_grid: Callable[[str], Grid] | None = None
    """Reads one matrix as whole numbers; None where the weights are not quantised."""
    few_bits: bool = False
    """Whether most weights have four bits each."""


def open_folder(folder: Path, stack: ExitStack) -> Checkpoint:
    """Opens the safetensors of a folder, sharded or not, until `stack` is closed.

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
