"""The memory is bounded, forgets the oldest, and finds what is near."""

from __future__ import annotations

import pytest
import torch

from models.planning.memory import Memory


def row(number: int) -> dict[str, torch.Tensor]:
    return {"key_BD": torch.tensor([[float(number), 0.0]]), "value": torch.tensor([number])}


def test_the_oldest_rows_are_overwritten() -> None:
    memory = Memory(4)
    for number in range(6):
        memory.write(**row(number))
    assert len(memory) == 4
    assert memory.recent(3)["value"].tolist() == [5, 4, 3]
    assert memory.recent(9)["value"].tolist() == [5, 4, 3, 2]
    memory.write(torch.arange(20.0).view(10, 2), value=torch.arange(10, 20))
    assert memory.recent(4)["value"].tolist() == [19, 18, 17, 16]


def test_reading_finds_the_nearest_keys() -> None:
    memory = Memory(10)
    memory.write(torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]]), value=torch.tensor([7, 8, 9]))
    distances, rows = memory.read(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), 2)
    assert rows["value"].tolist() == [[7, 9], [8, 9]]
    torch.testing.assert_close(distances, torch.tensor([[0.0, 1.0], [1.0, 13**0.5]]))
    assert memory.read(torch.zeros(1, 2), 99)[0].shape == (1, 3)


def test_mistakes_are_told() -> None:
    memory = Memory(3)
    with pytest.raises(LookupError, match="empty"):
        memory.recent(1)
    memory.write(**row(0))
    with pytest.raises(ValueError, match="the memory has"):
        memory.write(torch.zeros(1, 2), other=torch.zeros(1))
    with pytest.raises(ValueError, match="at least one row"):
        Memory(0)
