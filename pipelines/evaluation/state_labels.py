"""Game states as tasks for probes: `--state` makes classes of a value, `--number` reads it as is.

    python -m pipelines.evaluate ... --state POSITION_X --number HEALTH ANGLE \
        --columns data/gameplay/columns.json --only my_way_home --bins 4

The value of a clip is that of its middle frame, the frame that the single-frame baseline sees. Its
class is a quantile bin of the value. The bins hold equal shares of the training set, and the test
sets use the same edges.

Shape suffixes: N clips, V values of a frame's state, F frames. K is the number of bins.
"""

from __future__ import annotations

import contextlib
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


def find_column(cfg: EvaluateConfig, name: str, flag: str = "--state") -> int:
    """Returns the index of a column among the V values of a frame.

    Args:
        cfg: the job, whose `--columns` lists the names for the game in `--only`.
        name: an index, taken as it is, or a name.
        flag: the flag that gave the name.

    Raises:
        ValueError: a name is given without --columns or --only, or is not found there.
    """
    if name.isdecimal():
        return int(name)
    if cfg.columns is None:
        raise ValueError(f"{flag}: {name!r} is a name; say with --columns where names are listed")
    if cfg.only is None:
        raise ValueError("--only: which game? --columns lists the states of each")
    fs, path = open_uri(cfg.columns)
    games = json.loads(fs.cat_file(path))
    if cfg.only not in games:
        raise ValueError(f"--columns: no {cfg.only!r} there; there are {', '.join(games)}")
    names: list[str] = games[cfg.only]["states"]
    if name not in names:
        known = ", ".join(names if len(names) < 20 else [*names[:5], "...", names[-1]])
        raise ValueError(f"{flag}: {cfg.only} has no {name!r}; it has {known}")
    return names.index(name)


def state_reader(
    column: int, sampler: ClipSampler, flag: str = "--state"
) -> Callable[[pa.Table], F64]:
    """Returns a function that reads the state at the middle frame of every row's clip, fp64 [N].

    A state that is null becomes NaN. The function raises a ValueError that names the flag where a
    frame's state has no such column.
    """

    def read(rows: pa.Table) -> F64:
        frames_NF = sampler.middle(rows["num_frames"].to_numpy(), rows["fps"].to_numpy())
        values = []
        for states, frame in zip(rows["states"], frames_NF[:, sampler.frames // 2], strict=True):
            state = states[int(frame)]
            if column >= len(state):
                raise ValueError(
                    f"{flag}: column {column}, but a frame has only {len(state)}; other games "
                    "with other states are left out with --only"
                )
            values.append(state[column].as_py())
        return np.array(values, np.float64)

    return read


@dataclasses.dataclass(frozen=True)
class Bins:
    """Divides numbers into K classes by the K - 1 edges between them."""

    edges: tuple[float, ...]

    @classmethod
    def of(cls, values_N: F64, count: int) -> Bins:
        """Makes bins that hold equal shares of `values_N`, as nearly as repeated values allow.

        Raises:
            ValueError: there are too few different values for so many bins, or none.
        """
        if not len(values_N):
            raise ValueError("--state: no clip has a finite value")
        # An edge is one of the values and belongs to the bin above it: equal values share a bin.
        shares = np.arange(1, count) / count
        edges = np.quantile(values_N, shares, method="higher")
        if len(np.unique(edges)) < count - 1 or edges[0] <= values_N.min():
            raise ValueError(
                f"--bins: the state has too few different values for {count} bins (edges "
                f"{', '.join(f'{edge:g}' for edge in edges)}, least value {values_N.min():g})"
            )
        return cls(tuple(float(edge) for edge in edges))

    @classmethod
    def most(cls, values_N: F64, count: int) -> Bins:
        """Makes at most `count` bins of the finite values, one if these are all but equal."""
        values_N = values_N[np.isfinite(values_N)]
        for smaller in range(count, 1, -1):
            with contextlib.suppress(ValueError):
                return cls.of(values_N, smaller)
        return cls(())

    def classes(self, values_N: F64) -> npt.NDArray[np.int64]:
        """Returns the class of every value, int64 [N]: the number of edges that it reaches.

        A value that is not finite gets the class after the last.
        """
        reached_N = np.searchsorted(self.edges, values_N, side="right")
        return np.where(np.isfinite(values_N), reached_N, len(self.edges) + 1).astype(np.int64)

    @property
    def names(self) -> list[str]:
        """Names of the classes, in order."""
        if not self.edges:
            return ["all"]
        edges = [f"{edge:g}" for edge in self.edges]
        between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
        return [f"below {edges[0]}", *between, f"{edges[-1]} and more"]
