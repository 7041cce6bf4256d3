"""Safetensors files that hold some rows of tensors, of which other files hold the rest.

The header says where the rows begin, in the form of `torch.distributed.checkpoint`, whose
`HuggingFaceStorageReader` reads these files too: under `DCP_SHARDING_INFO`, by name,
`{"saved_offsets": [first row, 0, ...]}`. Beside it stands the whole tensor's `shape`. Files without
it hold whole tensors. Row means an index of the first dimension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.shards import rows_of, sharded_like
from models.tensor_files import save_tensors

KEY = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, or all."""

    rows: Tensor
    first: int
    """Number of the first of them."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows."""
        return tuple(self.rows.shape) == self.shape


def piece_of(tensor: Tensor) -> Piece:
    """Copies the rows that this process holds of a tensor to the host's memory."""
    first, rows = 0, tensor.detach()
    if isinstance(rows, DTensor):
        first, rows = rows_of(rows).start, rows.to_local()
    return Piece(rows.to("cpu", copy=True), first, tuple(tensor.shape))


def save_pieces(pieces: Mapping[str, Piece], path: Path) -> None:
    """Writes pieces to a file; whole tensors alone make an ordinary file without offsets."""
    metadata = None
    if not all(piece.is_whole for piece in pieces.values()):
        info = {name: _offsets(piece) for name, piece in pieces.items()}
        metadata = {"format": "pt", KEY: json.dumps(info)}
    save_tensors({name: piece.rows for name, piece in pieces.items()}, path, metadata)


def _offsets(piece: Piece) -> dict[str, list[int]]:
    begin = [piece.first, *[0] * (len(piece.shape) - 1)] if piece.shape else []
    return {"saved_offsets": begin, "shape": list(piece.shape)}


def parse_offsets(metadata: Mapping[str, str] | None) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns first row and shape of the whole by name from a file's metadata; {} without offsets.

    Raises:
        ValueError: they are damaged.
    """
    text = (metadata or {}).get(KEY, "{}")
    try:
        info: dict[str, Any] = json.loads(text)
        return {
            name: (int((entry["saved_offsets"] or [0])[0]), tuple(map(int, entry["shape"])))
            for name, entry in info.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the offsets in its header are damaged: {error!r}") from error


def load_pieces(path: Path) -> dict[str, Piece]:
    """Reads the pieces of a file, whose pages are loaded from the disk when they are used.

    Raises:
        ValueError: the offsets in the header are damaged.
    """
    with safe_open(path, "pt") as file:
        offsets = parse_offsets(file.metadata())
    return {
        name: Piece(rows, *offsets.get(name, (0, tuple(rows.shape))))
        for name, rows in load_file(path).items()
    }


def join(pieces: Sequence[Piece], like: Tensor | None = None) -> Tensor:
    """Puts the pieces of a tensor together.

    Args:
        pieces: all of them, in any order.
        like: a tensor of the same name; if it is sharded and of the same shape, only the rows that
            this process holds of it are read.

    Returns:
        The whole tensor, or one sharded as `like` is.

    Raises:
        ValueError: rows are missing.
    """
    shape = pieces[0].shape
    sharded = isinstance(like, DTensor) and tuple(like.shape) == shape
    wanted = rows_of(like) if isinstance(like, DTensor) and sharded else slice(0, None)
    rows = _rows(sorted(pieces, key=lambda piece: piece.first), wanted)
    return sharded_like(rows, like) if isinstance(like, DTensor) and sharded else rows


def _rows(pieces: Sequence[Piece], wanted: slice) -> Tensor:
    if len(pieces) == 1 and pieces[0].is_whole:
        return pieces[0].rows[wanted] if wanted.stop is not None else pieces[0].rows
    total = pieces[0].shape[0]
    stop = total if wanted.stop is None else wanted.stop
    end, parts = 0, []
    for piece in pieces:
        if piece.first != end or piece.shape != pieces[0].shape:
            break
        end += len(piece.rows)
        parts.append(piece.rows[max(wanted.start - piece.first, 0) : max(stop - piece.first, 0)])
    if end != total:
        raise ValueError(f"{end} of {total} rows follow each other")
    return torch.cat(parts)
