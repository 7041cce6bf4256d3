"""What a probe is: a function of frozen features, its score, and the columns of its numbers.

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.readouts import Readout

Row: TypeAlias = Mapping[str, Any]
"""The numbers of one encoder or baseline, as `rows` of results.json holds them."""
Labelled: TypeAlias = tuple[Tensor, np.ndarray]
"""Features [N, D] and class indices, or the values of a number, [N]."""
Tokens: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Tokens [N, T, D] and labels [N]."""
Readouts: TypeAlias = dict[tuple[str | None, str], Readout]
"""Fitted probes by the number that they read (None for the classes) and their own name."""


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """One row of the evaluation, as every probe receives it."""

    row: str
    """Key of the row: "encoder", "random_init", "single_frame" or "raw_pixels"."""
    train: ProbeSet
    """The set to learn from."""
    test: ProbeSet
    """The set to be scored on."""
    cfg: EvaluateConfig
    """The job's settings."""
    heads: int
    """Attention heads of the encoder."""
    shifted: ProbeSet | None = None
    """The second test set, scored by the same probe; None without --shift-test."""
    number: str | None = None
    """The number to read, whose values are the sets' labels; None to tell the classes apart."""
    readouts: Readouts = field(default_factory=dict)
    """Where a probe whose answer can be drawn over the patches puts what it fitted."""

    @property
    def device(self) -> torch.device:
        """Where probes run."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def features(self) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray]:
        """Training features [N, D] on `device`, labels [N]; test features [Q, D] and labels [Q]."""
        bank_ND = torch.from_numpy(self.train.features[self.row]).to(self.device)
        return (bank_ND, self.train.labels_N, *self._of(self.test))

    @property
    def shifted_features(self) -> Labelled | None:
        """Features and labels of the second test set, where there is one."""
        return None if self.shifted is None else self._of(self.shifted)

    @property
    def tokens(self) -> tuple[Tokens, Tokens, Tokens | None]:
        """Tokens and labels of the training set, the test set and, if there is one, the second."""
        shifted = None if self.shifted is None else self._tokens(self.shifted)
        return self._tokens(self.train), self._tokens(self.test), shifted

    def _tokens(self, part: ProbeSet) -> Tokens:
        return part.tokens[self.row], part.labels_N

    def _of(self, part: ProbeSet) -> Labelled:
        return torch.from_numpy(part.features[self.row]), part.labels_N


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of every table of results: terminal, report and comparison."""

    key: str
    """Where a row of results.json holds the number, with dots between nested keys."""
    name: str
    """Heading."""
    meaning: str
    """One sentence for the report. `{settings[...]}` and `{row[...]}` are filled in from
    results.json: the job's settings and the encoder's row."""
    better: Literal["higher", "lower"] | None = "higher"
    """Which number is the best one of a column; None where none is."""
    text: Callable[[Row], str] | None = None
    """How a row's number is written; None for a percentage."""
    read: Callable[[Row], float | None] | None = None
    """How the number is read where that takes more than looking up `key`."""

    def number(self, row: Row) -> float | None:
        """Returns the row's number; None where the row has none."""
        if self.read is not None:
            return self.read(row)
        return look_up(row, self.key)

    def cell(self, row: Row) -> str | None:
        """Returns the number as text; None where the row has none."""
        number = self.number(row)
        if number is None:
            return None
        return percent(number) if self.text is None else self.text(row)


@dataclass(frozen=True)
class Score:
    """The number that sums a probe up: an accuracy, or the R2 of a number."""

    key: str
    """Where a row of results.json holds it, with dots between nested keys."""
    shift_key: str
    """Where the row holds it for the second test set."""

    @property
    def probe(self) -> str:
        """The key under which a row holds what the probe measured."""
        return self.key.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A measurement of frozen features."""

    run: Callable[[ProbeTask], dict[str, Any]]
    """Returns what goes into a row of results.json; {} where it does not apply to the row."""
    columns: tuple[Column, ...]
    """The columns that show it; the first one shows the score, where there is one."""
    score: Score | None = None
    """Set for probes that learn from all training labels, whose scores may stand for the row."""
    classes: bool = True
    """Whether it needs classes."""


def look_up(row: Row, key: str) -> float | None:
    """Returns a row's number, None where it has none; `key` has dots between nested keys."""
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def percent(fraction: float) -> str:
    """Writes a fraction in per cent, without the sign."""
    return f"{100 * fraction:.1f}"
