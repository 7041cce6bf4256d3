"""Checks that a checkpoint is whole: every file exists, parses, and has the size its header says.

Only headers of tensors are read, so a checkpoint on S3 takes a few requests. Flipped bits inside a
tensor are found when it is loaded, by the digests (`checkpoint_format`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.digests import CHANGED, digest_of_bytes, parse_digests
from models.tensor_rows import parse_offsets
from pipelines.config.as_json import from_json
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import (
    GROUPS,
    CheckpointState,
    digests_name,
    file_name,
    parse_state,
)
from pipelines.runtime.uris import open_uri

Shapes = dict[str, tuple[int, ...]]

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
BYTES |= {"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
BYTES |= {"U64": 8, "I64": 8, "F64": 8, "C64": 8}
"""Bytes of one element, by safetensors' name of the dtype."""


def find_fault(uri: str, groups: Sequence[str] = GROUPS) -> str | None:
    """Returns why a checkpoint is not whole, or None if it is.

    Args:
        uri: The checkpoint's folder.
        groups: Groups of tensors to check; evaluation needs only `model`.
    """
    fs, path = open_uri(uri)
    try:
        names = {str(entry).rpartition("/")[2] for entry in fs.ls(path, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    try:
        state, _ = read_description(fs, path)
        _require_all_digests(names, state.world_size)
        for group in groups:
            for rank in range(state.world_size):
                _read_named_header(fs, path, file_name(group, rank, state.world_size))
    except ValueError as error:
        return str(error)
    return None


def _require_all_digests(names: set[str], world_size: int) -> None:
    """Checkpoints made before there were digests have none; any other has those of all."""
    expected = [digests_name(rank, world_size) for rank in range(world_size)]
    missing = [name for name in expected if name not in names]
    if 0 < len(missing) < world_size:
        raise ValueError(f"{missing[0]} is missing")


def read_shapes(uri: str, group: str = "model") -> Shapes:
    """Reads the shapes of a group's tensors by name, without their values.

    Raises:
        ValueError: A file is missing or damaged; the message names it.
    """
    fs, path = open_uri(uri)
    state, _ = read_description(fs, path)
    shapes: Shapes = {}
    for rank in range(state.world_size):
        shapes |= _read_named_header(fs, path, file_name(group, rank, state.world_size))
    return shapes


def read_description(fs: Any, path: str) -> tuple[CheckpointState, PretrainConfig]:
    """Reads state.json and config.json of a checkpoint.

    Raises:
        ValueError: One of them is missing or damaged; the message names it.
    """
    texts = {}
    for name in ("state.json", "config.json"):
        try:
            texts[name] = fs.cat_file(f"{path}/{name}")
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        if not texts[name].strip():
            raise ValueError(f"{name} is empty")
    try:
        state = parse_state(texts["state.json"].decode())
    except ValueError as error:
        raise ValueError(f"state.json cannot be read: {error}") from error
    try:
        config = from_json(PretrainConfig, texts["config.json"].decode())
    except ValueError as error:
        raise ValueError(f"config.json cannot be read: {error}") from error
    _check_texts(texts, fs, f"{path}/{digests_name(0, state.world_size)}")
    return state, config


def _check_texts(texts: Mapping[str, bytes], fs: Any, digests_path: str) -> None:
    try:
        digests = parse_digests(fs.cat_file(digests_path))
    except FileNotFoundError:  # made before there were digests
        return
    except ValueError as error:
        raise ValueError(f"{digests_path.rpartition('/')[2]} {error}") from error
    for name, text in texts.items():
        if digests.get(name) != digest_of_bytes(text):
            raise ValueError(f"{name} {CHANGED}")


def _read_named_header(fs: Any, path: str, name: str) -> Shapes:
    try:
        return read_header(fs, f"{path}/{name}")
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def read_header(fs: Any, path: str) -> Shapes:
    """Reads shapes by name from the header of a safetensors file.

    Such a file holds the header's length in 8 bytes, the header as JSON, and then the data.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is cut, too long, or not a safetensors file; the message is a predicate
            to be put after the file's name.
    """
    size = int(fs.size(path))
    length = int.from_bytes(fs.cat_file(path, start=0, end=8), "little") if size > 8 else size
    if length > size - 8:
        raise ValueError(f"is cut or no safetensors file ({size:,} bytes)")
    try:
        entries = json.loads(fs.cat_file(path, start=8, end=8 + length))
        shapes, expected = _parse_header(entries)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("has a damaged header") from None
    if size != 8 + length + expected:
        raise ValueError(f"has {size:,} bytes where its header says {8 + length + expected:,}")
    return shapes


def _parse_header(entries: dict[str, Any]) -> tuple[Shapes, int]:
    """Returns the shapes of the whole tensors by name, and the number of bytes of those that are
    here, which lie end to end."""
    shapes: Shapes = {}
    offsets = parse_offsets(entries.get("__metadata__"))
    spans = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(entry["shape"]) * BYTES[entry["dtype"]]:
            raise ValueError(f"{name} has another size")
        _, shapes[name] = offsets.get(name, (0, tuple(entry["shape"])))
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("tensors do not lie end to end")
        position = end
    return shapes, position
