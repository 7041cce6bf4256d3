"""The search space of a sweep: parses `--space`, draws settings, applies them to a recipe."""

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
"""Values of fields by their dotted names."""

FREE = {
    "model": {"patch_std", "predictor_width", "predictor_depth", "activation_checkpointing"},
    "run": {"seed"},
    "clip": {"jitter"},
}
"""Fields that may vary in these sections.

The other fields would change what RankMe is measured on, or the run's length, location or machine.
"""


@dataclass(frozen=True)
class Axis:
    """One entry of `--space`: a list of choices, or the two ends of a range."""

    key: str
    kind: Literal["choice", "uniform", "log"]
    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value at `share` in [0, 1) of the range or list; an int for int fields."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        if isinstance(low, int):
            # Every integer gets an interval of length 1, so uniform draws them equally often.
            high += 1
        value = (
            low + share * (high - low)
            if self.kind == "uniform"
            else math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        )
        return int(value) if isinstance(low, int) else float(f"{value:.4g}")


def parse_space(entries: Sequence[str], base: PretrainConfig) -> tuple[Axis, ...]:
    """Parses `--space`, converts every value to its field's type, and tries it on `base`.

    Raises:
        ValueError: There is no such field, it must not vary, or a value is invalid; the message
            names the entry.
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
    """Converts `text` to a field's type `hint`; raises ValueError if it is not of that type."""
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
    """Draws the settings of every run: all combinations, or `samples` different random ones.

    Raises:
        ValueError: All combinations are asked for but there is a range, or there are fewer
            combinations than `samples`.
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
    """Returns `base` with the fields of `settings` replaced.

    Raises:
        ValueError: The values contradict each other; the message names the flag.
    """
    sections: dict[str, Settings] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return dataclasses.replace(
        base,
        **{name: dataclasses.replace(getattr(base, name), **s) for name, s in sections.items()},
    )
