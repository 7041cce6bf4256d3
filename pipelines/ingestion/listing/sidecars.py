"""Sidecars: arrays beside a video with one row for each of its frames, such as actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipelines.ingestion.entries.entries import File
from pipelines.ingestion.listing.media import suffix_of

# Beside NAME.mp4: NAME.actions.npy, NAME.states.npy.
SIDECARS = ("actions", "states")
SIDECAR_SUFFIXES = tuple(f".{name}.npy" for name in SIDECARS)


def sidecar_path(path: str, name: str) -> str:
    """Returns the path of the sidecar `name` of the file at `path`."""
    return f"{path[: len(path) - len(suffix_of(path))]}.{name}.npy"


def attach_sidecars(files: Sequence[File]) -> list[File]:
    """Removes sidecars from a list of files and notes them at the files that they belong to.

    A file's tag then includes those of its sidecars, so that it changes when one of them does.
    """
    tags = {(protocol, entry.path): entry.tag for _, protocol, entry in files}
    paths = {sidecar_path(entry.path, name) for _, _, entry in files for name in SIDECARS}
    found = []
    for name, protocol, entry in files:
        if entry.path in paths:
            continue
        beside = [(s, tags.get((protocol, sidecar_path(entry.path, s)))) for s in SIDECARS]
        present = [(sidecar, tag) for sidecar, tag in beside if tag is not None]
        tag = "|".join([entry.tag, *(tag for _, tag in present)])
        sidecars = tuple(sidecar for sidecar, _ in present)
        found.append((name, protocol, dataclasses.replace(entry, tag=tag, sidecars=sidecars)))
    return found
