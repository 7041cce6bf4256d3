"""A short-term memory of bounded size: a ring of rows that are found by their keys.

It feeds the critic (`recent`) and lends plans to similar situations (`read`).

Shape legend: N rows in the memory, B rows at once, D key width, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """The last `capacity` rows that were written; each has a key and named values.

    Args:
        capacity: most rows; the oldest are overwritten.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a memory needs room for at least one row, got {capacity}")
        self.capacity, self._written = capacity, 0
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self._written, self.capacity)

    def write(self, key_BD: Tensor, **values: Tensor) -> None:
        """Adds rows; the first call fixes names, shapes and types.

        Raises:
            ValueError: the names are not those of the first call.
        """
        rows = {"key": key_BD, **values}
        if not self._columns:
            self._columns = {
                name: column.new_zeros((self.capacity, *column.shape[1:]))
                for name, column in rows.items()
            }
        if rows.keys() != self._columns.keys():
            raise ValueError(f"rows have {sorted(rows)}, the memory has {sorted(self._columns)}")
        count = len(key_BD)
        last = min(count, self.capacity)  # of more rows than there is room for, the newest stay
        newest = torch.arange(count - last, count, device=key_BD.device)
        places = (self._written + newest) % self.capacity
        for name, column in rows.items():
            self._columns[name][places] = column[count - last :].detach()
        self._written += count

    def read(self, query_BD: Tensor, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the rows whose keys are nearest, nearest first.

        Returns:
            Their Euclidean distances [B, K], and their columns by name, [B, K, ...], where K is
            `count`, or fewer if the memory has fewer rows.
        """
        stored = self._stored()
        distance_BN = torch.cdist(query_BD, stored["key"])
        found = distance_BN.topk(min(count, len(self)), dim=1, largest=False)
        return found.values, {name: column[found.indices] for name, column in stored.items()}

    def recent(self, count: int) -> dict[str, Tensor]:
        """Returns the newest rows, the newest first."""
        count = min(count, len(self))
        places = (self._written - 1 - torch.arange(count)) % self.capacity
        return {name: column[places] for name, column in self._stored().items()}

    def _stored(self) -> dict[str, Tensor]:
        if not self._written:
            raise LookupError("the memory is empty")
        return {name: column[: len(self)] for name, column in self._columns.items()}
