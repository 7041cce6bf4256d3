"""Game states as classes: `--state` makes a task for the probes of what each frame's sidecar says.

    python -m pipelines.evaluate ... --state POSITION_X --columns data/gameplay/columns.json \
        --only my_way_home --bins 4

A clip's class is the quantile bin of the state at its middle frame, the one that the single-frame
baseline sees. Bins hold equal shares of the training set; the test sets take their edges.

N clips, V values of a frame's state, K bins.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.config.jobs import EvaluateConfig
from pipelines.loading.clips import ClipSampler
from pipelines.runtime.uris import open_uri

F64 = npt.NDArray[np.float64]


def find_column(cfg: EvaluateConfig) -> int:
    """Returns which of the V values of a frame `--state` means.

    A number is a number; a name is looked up in `--columns`, by the game that `--only` names.

    Raises:
        ValueError: a name and nothing to look it up in, or not found there.
    """
    name = str(cfg.state)
    if name.isdecimal():
        return int(name)
    if cfg.columns is None:
        raise ValueError(f"--state: {name!r} is a name; say with --columns where names are listed")
    if cfg.only is None:
        raise ValueError("--only: which game? --columns lists the states of each")
    fs, path = open_uri(cfg.columns)
    games = json.loads(fs.cat_file(path))
    if cfg.only not in games:
        raise ValueError(f"--columns: no {cfg.only!r} there; there are {', '.join(games)}")
    names: list[str] = games[cfg.only]["states"]
    if name not in names:
        known = ", ".join(names if len(names) < 20 else [*names[:5], "...", names[-1]])
        raise ValueError(f"--state: {cfg.only} has no {name!r}; it has {known}")
    return names.index(name)


def state_reader(column: int, sampler: ClipSampler) -> Callable[[pa.Table], F64]:
    """Returns the function that reads the state at the middle frame of every row's clip, [N].

    It raises ValueError where a row has no such column.
    """

    def read(rows: pa.Table) -> F64:
        frames_NF = sampler.middle(rows["num_frames"].to_numpy(), rows["fps"].to_numpy())
        values = []
        for states, frame in zip(rows["states"], frames_NF[:, sampler.frames // 2], strict=True):
            state = states[int(frame)]
            if column >= len(state):
                raise ValueError(
                    f"--state: column {column}, but a frame has only {len(state)}; other games with "
                    "other states are left out with --only"
                )
            values.append(state[column].as_py())
        return np.array(values, np.float64)

    return read


@dataclasses.dataclass(frozen=True)
class Bins:
    """K classes of a number, by the K - 1 edges between them."""

    edges: tuple[float, ...]

    @classmethod
    def of(cls, values_N: F64, count: int) -> Bins:
        """Bins of equal shares of `values_N`, as nearly as repeated values allow.

        Raises:
            ValueError: there are fewer different values than that.
        """
        # An edge is the first value above it, so that values that are equal share a bin.
        shares = np.arange(1, count) / count
        edges = np.quantile(values_N, shares, method="higher")
        if len(np.unique(edges)) < count - 1 or edges[0] <= values_N.min():
            raise ValueError(
                f"--bins: the state has too few different values for {count} bins (edges "
                f"{', '.join(f'{edge:g}' for edge in edges)}, least value {values_N.min():g})"
            )
        return cls(tuple(float(edge) for edge in edges))

    def classes(self, values_N: F64) -> npt.NDArray[np.int64]:
        """Returns the class of every value, int64 [N]: how many edges it reaches."""
        return np.searchsorted(self.edges, values_N, side="right").astype(np.int64)

    @property
    def names(self) -> list[str]:
        """What the classes are called."""
        edges = [f"{edge:g}" for edge in self.edges]
        between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
        return [f"below {edges[0]}", *between, f"{edges[-1]} and more"]
