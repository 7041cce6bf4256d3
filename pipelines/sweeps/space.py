"""What a sweep varies: entries of `--space`, the settings drawn from them, the runs these make."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipelines.config.train import PretrainConfig

Settings = dict[str, Any]
"""Dotted name of a field to its value."""

FREE = {
    "model": {"patch_std", "predictor_width", "predictor_depth", "activation_checkpointing"},
    "run": {"seed"},
    "clip": {"jitter"},
}
"""Of these sections, what may vary; the rest would change what RankMe is measured on, or the run's
length, place and machine."""


@dataclass(frozen=True)
class Axis:
    """One entry: a list of choices, or the two ends of a range."""

    key: str
    kind: Literal["choice", "uniform", "log"]
    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1) of the way; a whole number where the field is one."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        if isinstance(low, int):
            # Every whole number has a stretch of its own: uniform takes them equally often.
            high += 1
        value = (
            low + share * (high - low)
            if self.kind == "uniform"
            else math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        )
        return int(value) if isinstance(low, int) else float(f"{value:.4g}")


def parse_space(entries: Sequence[str], base: PretrainConfig) -> tuple[Axis, ...]:
    """Reads `--space`; every value is converted to its field's type and tried on `base`.

    Raises:
        ValueError: naming the entry: no such field, a value that is none, a field that must stay.
    """
    if not entries:
        raise ValueError("--space: say what varies, such as optim.lr=log:1e-4:1e-2")
    axes = tuple(_parse(entry, base) for entry in entries)
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise ValueError(f"--space: the same field twice in {' '.join(keys)}")
    return axes


def _parse(entry: str, base: PretrainConfig) -> Axis:
    key, equals, text = entry.partition("=")
    try:
        if not (equals and text):
            raise ValueError("write name=values")
        axis = _axis(key.replace("-", "_"), text, _field_type(key.replace("-", "_"), base))
        for value in axis.values:
            apply(base, {axis.key: value})
    except ValueError as error:
        raise ValueError(f"--space {entry}: {error}") from error
    return axis


def _field_type(key: str, base: PretrainConfig) -> Any:
    section, _, name = key.partition(".")
    hints = typing.get_type_hints(type(getattr(base, section, None)))
    if name not in hints or not dataclasses.is_dataclass(getattr(base, section, None)):
        raise ValueError(f"a run has no {key!r} (docs/configuration.md lists what it has)")
    if section in FREE and name not in FREE[section]:
        may = ", ".join(f"{section}.{n}" for n in sorted(FREE[section]))
        raise ValueError(
            f"runs that differ in {key} are not comparable; of --{section} may vary: {may}"
        )
    if key in ("data.train", "data.test"):
        raise ValueError("RankMe compares runs on the same data only")
    return hints[name]


def _axis(key: str, text: str, hint: Any) -> Axis:
    kind, colon, ends = text.partition(":")
    if not (colon and kind in ("uniform", "log")):
        parts = re.findall(r"\([^)]*\)|[^,]+", text)
        return Axis(key, "choice", tuple(_convert(part.strip(), hint) for part in parts))
    if hint not in (int, float):
        raise ValueError(f"a range needs a field that is one number; {key} takes a list of choices")
    values = tuple(_convert(end, hint) for end in ends.split(":"))
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError(f"write {kind}:LOW:HIGH with LOW < HIGH")
    if kind == "log" and values[0] <= 0:
        raise ValueError("log needs LOW > 0")
    return Axis(key, "log" if kind == "log" else "uniform", values)


def _convert(text: str, hint: Any) -> Any:
    """The value that `text` writes for a field of type `hint`; ValueError if it is none."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if text.lower() == "none" else _convert(text, of[0])
    if origin is Literal:
        if text not in of:
            raise ValueError(f"{text!r} is none of {', '.join(of)}")
        return text
    if origin is tuple:
        parts = text.strip("()").split(",")
        kinds = of[:1] * len(parts) if of[-1] is Ellipsis else of
        if len(parts) != len(kinds):
            raise ValueError(f"{text!r} has {len(parts)} values, not {len(kinds)}: write (a,b)")
        return tuple(_convert(part.strip(), of) for part, of in zip(parts, kinds, strict=True))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is not true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{text!r} is not of type {hint.__name__}") from None


def draw(axes: Sequence[Axis], samples: int | None, seed: int) -> list[Settings]:
    """The settings of every run: all combinations, or `samples` at random and all different.

    Raises:
        ValueError: all combinations of a range, or more samples than there are combinations.
    """
    keys = [axis.key for axis in axes]
    ranges = [axis.key for axis in axes if axis.kind != "choice"]
    rng = np.random.default_rng(seed)
    if not ranges:
        grid = list(itertools.product(*(axis.values for axis in axes)))
        if (samples or 0) > len(grid):
            raise ValueError(f"--samples: --space has only {len(grid)} combinations")
        order = range(len(grid)) if samples is None else rng.permutation(len(grid))[:samples]
        return [dict(zip(keys, grid[i], strict=True)) for i in order]
    if samples is None:
        raise ValueError(f"--samples: say how many; {', '.join(ranges)} is a range")
    drawn: list[Settings] = []
    for _ in range(100 * samples):
        settings = {axis.key: axis.at(float(rng.random())) for axis in axes}
        if settings not in drawn:
            drawn.append(settings)
        if len(drawn) == samples:
            return drawn
    raise ValueError(f"--samples: found only {len(drawn)} different runs in --space")


def apply(base: PretrainConfig, settings: Mapping[str, Any]) -> PretrainConfig:
    """`base` with fields replaced.

    Raises:
        ValueError: the values do not go together; the message names the flag.
    """
    sections: dict[str, Settings] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return dataclasses.replace(
        base,
        **{name: dataclasses.replace(getattr(base, name), **s) for name, s in sections.items()},
    )
