"""Where a model lies: a Hugging Face folder, a hub id or a GGUF file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Code is left behind, and so are the formats that run code when read.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


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
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    generation = folder / "generation_config.json"
    if generation.is_file():
        ends = json.loads(generation.read_text()).get("eos_token_id")
        if ends is not None:
            config["eos_token_id"] = ends
    return config
