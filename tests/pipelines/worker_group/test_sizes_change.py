"""A group that changes its size computes what a group of one size does; no Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.fake_training import TIMED, change, lines_of, tiny_config
from helpers.pipelines.group_training import train_group
from helpers.pipelines.sample_logs import chain, samples

OPTIMS = {"ijepa": {"name": "hyper-adamw", "tune": ("lr", "beta1")}, "vicreg": {}}
TIMINGS = TIMED | {"straggler_share"}


@pytest.fixture(autouse=True)
def _ask_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYJEPA_ASK_EVERY_S", "0")


def run(folder: Path, objective: str, groups: list[tuple[int, int | None]]) -> list[dict]:
    """Trains with groups of these sizes one after the other, each stopped after so many steps.

    Returns:
        The lines of metrics.jsonl.
    """
    cfg = tiny_config(folder, name="run", workers=(1, 2), log_samples=True)
    cfg = change(cfg, objective={"name": objective}, optim=OPTIMS[objective])
    for size, stop in groups:
        train_group(cfg, folder / "checkpoints", size, stop)
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines_of(cfg)]


@pytest.mark.parametrize("objective", ["ijepa", "vicreg"])
def test_two_one_two_workers_read_as_one(tmp_path: Path, objective: str) -> None:
    """Stops at steps 3 and 7; metrics are read every five, so that readings span the stops."""
    fixed = run(tmp_path / "fixed", objective, [(1, None)])
    folder = tmp_path / "changed"
    changed = run(folder, objective, [(2, 3), (1, 4), (2, None)])
    assert sorted(p.name[-2:] for p in (folder / "checkpoints").glob("checkpoint_*")) == [
        *("03", "04", "07", "08", "12"),
    ]
    assert [row["step"] for row in changed] == [row["step"] for row in fixed]
    for ours, theirs in zip(changed, fixed, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)
        if objective == "ijepa":  # micro-batches of the same rows, so also what is read within them
            assert ours == pytest.approx(theirs, rel=1e-3)
    rows = samples(folder / "run")
    assert len(rows) == 3 * 2 + 4 + 5 * 2  # no step twice
    assert chain(rows) == chain(samples(tmp_path / "fixed" / "run"))


def test_without_new_weights_a_reading_across_a_stop_would_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    from pipelines.training.collapse import MeanMeter

    monkeypatch.setattr(MeanMeter, "reweigh", lambda *_: None)
    fixed = run(tmp_path / "fixed", "vicreg", [(1, None)])
    changed = run(tmp_path / "changed", "vicreg", [(2, 3), (1, None)])
    first = [row["loss"] for row in (fixed[0], changed[0])]
    assert first[1] != pytest.approx(first[0], rel=1e-4)
    assert changed[-1]["loss"] == pytest.approx(fixed[-1]["loss"], rel=1e-4)
