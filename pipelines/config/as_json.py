"""A configuration as JSON, and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(config: Any) -> str:
    """Returns `config` (any configuration) as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(cls: type[T], text: str) -> T:
    """Rebuilds a `cls` from `to_json`'s text.

    Raises:
        ValueError: a key is unknown or missing (its path is named), or a value fails validation.
    """
    return _from_dict(cls, json.loads(text), cls.__name__)


def _from_dict(cls: type[T], values: dict[str, Any], path: str) -> T:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: an object was expected, not {values!r:.40}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{path}: unknown keys {unknown}")
    try:
        return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _from_dict(hint, value, path)
    if isinstance(hint, types.UnionType):
        members = typing.get_args(hint)
        lists = [m for m in members if typing.get_origin(m) is tuple]
        wanted = lists[0] if lists and isinstance(value, list) else members[0]
        return None if value is None else _convert(wanted, value, path)
    return tuple(value) if typing.get_origin(hint) is tuple else value
