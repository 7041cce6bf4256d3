"""The account of samples finds what it is there to find; needs no rig."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.cluster.accounting import chain, faults_of_chain, repeated

SAMPLES, BATCH = 8, 4


def lines() -> list[dict[str, Any]]:
    """Two epochs of two steps on two processes; step 3 was taken twice."""

    def line(step: int, rank: int, attempt: int, ids: str) -> dict[str, Any]:
        return {"step": step, "rank": rank, "attempt": attempt, "ids": list(ids)}

    return [
        *(line(1, 0, 1, "ab"), line(1, 1, 1, "cd"), line(2, 0, 1, "ef"), line(2, 1, 1, "gh")),
        line(3, 0, 1, "ax"),  # of the attempt that was lost
        *(line(3, 0, 2, "ha"), line(3, 1, 2, "bg"), line(4, 0, 2, "cf"), line(4, 1, 2, "ed")),
    ]


def faults(found: list[dict[str, Any]], last_step: int = 4) -> list[str]:
    return faults_of_chain(chain(found, last_step), last_step, SAMPLES, BATCH)


def test_a_whole_chain() -> None:
    assert faults(lines()) == []
    assert faults(lines(), 3) == []  # a part of an epoch
    assert repeated(lines()) == 1


@pytest.mark.parametrize(
    ("step", "rank", "ids", "told"),
    [
        (4, 1, "ee", "doubled"),
        (4, 1, "e", "1 samples lost"),
        (4, 1, "ex", "no other epoch"),
        (4, 1, None, "2 samples lost"),
    ],
)
def test_a_chain_with_a_fault(step: int, rank: int, ids: str | None, told: str) -> None:
    kept = [line for line in lines() if (line["step"], line["rank"]) != (step, rank)]
    changed = [{"step": step, "rank": rank, "attempt": 2, "ids": list(ids)}] if ids else []
    assert any(told in fault for fault in faults(kept + changed))


def test_a_step_that_nobody_logged() -> None:
    assert (
        "no samples are logged for [2]" in faults([one for one in lines() if one["step"] != 2])[0]
    )
