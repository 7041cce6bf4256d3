"""Where a model lies (a Hugging Face folder, a hub id or a GGUF file), and reading its JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from models.sink_lm.network.config import UnsupportedModel

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
        path: a folder, a `.gguf` file, a folder that holds exactly one, or, where no such path
            exists, a hub id `org/name`, which is downloaded once and then read from the hub's cache.

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
    """Reads `config.json`, with the end tokens of `generation_config.json`, which names them all."""
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
        ValueError: names the file when it holds no JSON object.
    """
    with errors_name(path):
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"holds a JSON {type(found).__name__}, not an object")
        return found


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Makes whatever a damaged or unknown file at `path` raises an error that names the file.

    Raises:
        UnsupportedModel: as it came, the file named.
        ValueError: everything else that `DAMAGE` lists.
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
