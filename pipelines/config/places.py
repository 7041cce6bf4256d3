"""Which fields of a configuration name a place: a file, a folder or a URI's prefix.

The type of such a field is `ReadPlace` or `WrittenPlace`. `pipelines.runtime` then makes it
absolute, tries it before work begins, and names its flag in errors.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceField:
    """Properties of a place, as the type of its field states them."""

    written: bool = False
    """The job writes there."""
    required: bool = True
    """The place must exist when the job begins, if it is read."""
    unless: str = ""
    """Name of another field. If that is set, this one names something else (a device, a stream)."""
    file: bool = False
    """What is written there is a file."""
    or_name: bool = False
    """The value may be another kind of name (a hub id), so it is neither changed nor checked."""


ReadPlace = Annotated[str, PlaceField()]
WrittenPlace = Annotated[str, PlaceField(written=True)]


@dataclasses.dataclass(frozen=True)
class Place:
    """A place that a configuration names."""

    flag: str
    """As on the command line: `--data.train`."""
    uri: str
    field: PlaceField


def places(*configs: Any) -> list[Place]:
    """All places that configurations name, in the order of their fields."""
    found: list[Place] = []

    def note(place: Place) -> str:
        found.append(place)
        return place.uri

    for config in configs:
        _visit(config, "--", note)
    return found


def with_places(config: C, function: Callable[[Place], str]) -> C:
    """Replaces every place that `config` names by what `function` makes of it."""
    changed: C = _visit(config, "--", function)
    return changed


def _visit(config: Any, prefix: str, function: Callable[[Place], str]) -> Any:
    hints = typing.get_type_hints(type(config), include_extras=True)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"{prefix}{field.name.rstrip('_').replace('_', '-')}"  # `from_` is --from
        if dataclasses.is_dataclass(value):
            changes[field.name] = _visit(value, f"{flag}.", function)
            continue
        for mark in _marks(hints[field.name]):
            if mark.unless and getattr(config, mark.unless):
                continue
            if value == "" and field.default != "":  # given, as by a shell's unset variable
                changes[field.name] = function(Place(flag, "", mark))
            else:
                changes[field.name] = _replace(value, flag, mark, function)
    changes = {name: new for name, new in changes.items() if new != getattr(config, name)}
    return dataclasses.replace(config, **changes) if changes else config


def _marks(hint: Any) -> Iterator[PlaceField]:
    """The mark in a field's type, also inside `| None` and `tuple[...]`."""
    yield from (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, PlaceField))
    for part in typing.get_args(hint):
        yield from _marks(part)


def _replace(value: Any, flag: str, mark: PlaceField, function: Callable[[Place], str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_replace(one, flag, mark, function) for one in value)
    if not value:  # not given
        return value
    return type(value)(function(Place(flag, str(value), mark)))
