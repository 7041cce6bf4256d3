"""What all workers of a run say when all of them wait is shown once, not once a worker."""

from __future__ import annotations

from pipelines.runtime.lines.worker_lines import Echoes

CPU = "waiting for a CPU to read data with: others hold {} of 4 CPUs (Hog 4)"
DATA = "worker {} has waited for data for {} s: 0 CPUs are free, others hold 4 of 4 CPUs"


def shown(lines: list[tuple[float, str]]) -> list[str]:
    echoes = Echoes()
    return [line for now, line in lines if not echoes.has(line, now)]


def test_one_worker_speaks_for_all_once_a_minute() -> None:
    """64 workers, none at quite the same moment; what they count may change meanwhile."""
    lines = [
        (60 * minute + rank / 8, DATA.format(rank, 60 * (1 + minute)))
        for minute in range(3)
        for rank in range(64)
    ]
    assert shown(lines) == [DATA.format(0, 60), DATA.format(0, 120), DATA.format(0, 180)]
    assert shown([(0.0, CPU.format(4)), (0.1, CPU.format(3)), (60.0, CPU.format(4))]) == [
        CPU.format(4),
        CPU.format(4),
    ]


def test_the_worker_that_waits_alone_is_told() -> None:
    assert shown([(0.0, CPU.format(4)), (1.0, DATA.format(7, 60))])[1] == DATA.format(7, 60)


def test_other_lines_are_all_shown() -> None:
    lines = ["step 1/9 loss 1", "step 1/9 loss 1", "waiting for 3 CPUs on one host (15 s)"]
    assert shown([(0.0, line) for line in [*lines, lines[-1]]]) == [*lines, lines[-1]]
