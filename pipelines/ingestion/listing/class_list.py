"""Reads a given list of classes, so that several sets have the same label indices."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pipelines.dataset.shards import MANIFEST
from pipelines.ingestion.listing.tables import decoded
from pipelines.runtime.uris import join_uri, open_uri


def read_classes(uri: str) -> tuple[str, ...]:
    """Returns class names, in the order of their indices.

    Args:
        uri: a text file with a name a line, a JSON list of names, a `manifest.json`, or the folder
            of an ingested set.

    Raises:
        ValueError: it is not there, is none of these, or names no class or one twice.
    """
    fs, path = open_uri(uri)
    if fs.isdir(path):
        fs, path = open_uri(join_uri(uri, MANIFEST))
    try:
        data = fs.cat_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"--classes: {path} does not exist") from error
    names = _names(decoded(data, uri, flag="classes")[0], uri)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"--classes: {uri} names {twice[0]!r} twice")
    if not names or "" in names:
        missing = f"has an empty line ({names.index('') + 1})" if names else "names no class"
        raise ValueError(f"--classes: {uri} {missing}")
    return tuple(names)


def _names(text: str, uri: str) -> list[str]:
    if text.lstrip()[:1] not in ("{", "["):
        return [line.strip() for line in text.rstrip().splitlines()]
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--classes: {uri} is no JSON: {error}") from error
    names = values.get("classes") if isinstance(values, dict) else values
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"--classes: {uri} is neither a list of names nor a manifest")
    return names
