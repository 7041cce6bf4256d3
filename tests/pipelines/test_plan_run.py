"""The command `plan_run`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers.pipelines.fake_training import change
from helpers.pipelines.loading import ROWS, write_samples
from helpers.pipelines.refusals import Told, teller
from pipelines import plan_run as command
from pipelines.capacity import measure as measuring
from pipelines.config.jobs import PlanRunConfig
from pipelines.recipes.images import debug


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return teller(monkeypatch, capsys)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_run", *arguments])
    command.main()


def test_the_table_says_what_binds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "debug", "--run.gpu", "--cluster", "g6.2xlarge")
    text = capsys.readouterr().out
    for part in ("debug: 1 worker on 1 x g6.2xlarge", "time of a step", "What binds: ", "$"):
        assert part in text


def test_json_holds_the_plan_and_what_it_stands_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "shards")
    arguments = ["debug", "--data.train", data, "--price", "3", "--json", "--run.steps", "100"]
    run(monkeypatch, *arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["samples"] == ROWS
    plan = found["plan"]
    assert plan["epochs"] == pytest.approx(100 * 32 / ROWS)
    assert plan["dollars"]["value"] == pytest.approx(3 * plan["hours"]["value"])
    assert plan["step_s"]["low"] < plan["step_s"]["value"] < plan["step_s"]["high"]
    assert set(found["constants"]) >= {"compute_flops", "decode_cpu_s"}


def test_measured_constants_are_kept_and_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, "TIMED_S", 0.2)
    kept = str(tmp_path / "constants.json")
    cfg = debug()
    first = command.plan_run(PlanRunConfig(measure=True, save=kept), cfg)
    again = command.plan_run(PlanRunConfig(constants=kept), cfg)
    assert again.constants == first.constants
    assert again.plan.step_s == first.plan.step_s
    assert command.plan_run(PlanRunConfig(), cfg).constants != first.constants


def test_a_group_that_may_shrink_is_planned_at_its_largest() -> None:
    cfg = change(debug(), run={"workers": (1, 4)})
    assert command.plan_run(PlanRunConfig(), cfg).cfg.run.workers == 4


def test_the_size_of_the_data_can_be_given() -> None:
    cfg = change(debug(), run={"steps": 10})
    found = command.data_size(PlanRunConfig(), cfg)
    assert (found.samples, found.sample_bytes) == (1_281_167, 110_000)
    given = command.data_size(PlanRunConfig(images=10, image_bytes=5), cfg)
    assert (given.samples, given.sample_bytes) == (10, 5)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--cluster", "p9"], "--cluster"),
        (["--hosts", "0"], "--hosts"),
        (["--hosts", "3"], "--hosts"),
        (["--price", "-1"], "--price"),
        (["--price", "inf"], "--price"),
        (["--image-bytes", "inf"], "--image-bytes"),
        (["--image-bytes", "nan"], "--image-bytes"),
        (["--measure", "--save", "{tmp}"], "--save"),
        (["--images", "0"], "--images"),
        (["--image-bytes", "0"], "--image-bytes"),
        (["--run.workers", "3"], "--run.workers"),
        (["--save", "{tmp}/c.json"], "--save"),
        (["--constants", "{tmp}/none.json"], "--constants"),
        (["--constants", "{tmp}/bad.json"], "--constants"),
        (["--data.train", "{tmp}/none"], "--data.train"),
        (["--data.batch-size", "33"], "--data.batch-size"),
        (["--run.gpu", "--run.workers", "4", "--hosts", "1", "--cluster", "g6.2xlarge"],
         "--run.workers"),
        (["--model.encoder", "vit_q"], "--model.encoder"),
        (["--objective.name", "no"], "--objective.name"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named(told: Told, tmp_path: Path, arguments: list[str], part: str) -> None:
    (tmp_path / "bad.json").write_text("[1, 2]")
    line = ["debug", *(argument.format(tmp=tmp_path) for argument in arguments)]
    text = told("plan_run", *line)
    assert part in text
    assert len(text.strip().splitlines()) <= 3
