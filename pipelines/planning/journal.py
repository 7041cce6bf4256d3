"""A journal of the episodes that a job has played, so that one that was ended goes on.

A part of a row's episodes is a file of its own, under a name that is a digest of everything that
decides about them: models, settings, row, starts and goals. So a part is found again by the same
job, and by no other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipelines.planning.episodes import Episodes
from pipelines.runtime.uris import join_uri, open_uri, write_atomic

SECONDS = "seconds"
"""Name of the tensor that holds the seconds that the episodes took."""


@dataclass(frozen=True, kw_only=True)
class Journal:
    """Files of episodes in a folder."""

    folder: str
    """URI of the folder."""

    def read(self, key: str) -> tuple[Episodes, float] | None:
        """Returns the episodes that were written under a key and their seconds; None if none were.

        Raises:
            ValueError: the file is damaged.
        """
        fs, path = open_uri(self._place(key))
        try:
            tensors = safetensors.torch.load(fs.cat_file(path))
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            raise ValueError(f"{self._place(key)}: is damaged ({error}); delete it.") from error
        seconds = float(tensors.pop(SECONDS))
        return Episodes(**tensors), seconds

    def write(self, key: str, episodes: Episodes, seconds: float) -> None:
        """Writes episodes under a key."""
        names = [field.name for field in dataclasses.fields(episodes)]
        tensors = {name: getattr(episodes, name).contiguous() for name in names}
        tensors[SECONDS] = torch.tensor(seconds, dtype=torch.float64)
        fs, path = open_uri(self._place(key))
        write_atomic(fs, path, safetensors.torch.save(tensors))

    def remove(self) -> None:
        """Removes the folder, when the results are written."""
        fs, path = open_uri(self.folder)
        if fs.exists(path):
            fs.rm(path, recursive=True)

    def _place(self, key: str) -> str:
        return join_uri(self.folder, f"{key}.safetensors")


def key_of(*values: Any) -> str:
    """Returns a digest of values, among them networks, tensors, dataclasses and functions.

    A function counts by its name.
    """
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()[:32]


def _feed(digest: Any, value: Any) -> None:
    """Adds the type and the content of a value to a digest."""
    digest.update(f"{type(value).__qualname__}(".encode())
    if isinstance(value, nn.Module):
        _feed(digest, value.state_dict())
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, Mapping):
        for name in value:
            _feed(digest, name)
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        for one in value:
            _feed(digest, one)
    else:
        name = getattr(value, "__qualname__", None)
        digest.update((name or repr(value)).encode())
    digest.update(b")")
