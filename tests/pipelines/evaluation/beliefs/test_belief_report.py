"""The sections about beliefs in the report of an evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluate import evaluate


def test_evaluate_draws_what_is_expected_only_when_asked(
    checkpoint: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    cfg = EvaluateConfig(
        checkpoint=checkpoint,
        data=sets[0],
        test=sets[1],
        out=str(tmp_path),
        probe_epochs=1,
        attentive_epochs=0,
        decode_steps=2,
    )
    quiet = Console(quiet=True)
    results = evaluate(cfg, console=quiet)
    assert results["beliefs"]["samples"] == 12
    assert set(results["beliefs"]["cuts"]) == {"encoder", "random_init", "pixel_change"}
    page = (tmp_path / "report.html").read_text()
    assert "<h2>What the predictor expects</h2>" in page
    assert "<h2>Surprise</h2>" in page
    plain = evaluate(dataclasses.replace(cfg, decode_steps=0), console=quiet)
    assert "beliefs" not in plain
    assert "What the predictor expects" not in (tmp_path / "report.html").read_text()
    assert plain["rows"] == results["rows"]
    with pytest.raises(ValueError, match="--decode-steps: must not be negative"):
        dataclasses.replace(cfg, decode_steps=-1)
