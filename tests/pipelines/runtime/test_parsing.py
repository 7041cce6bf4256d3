"""Values that our checks refuse are errors of ours; wrong usage stays the parser's to tell."""

from __future__ import annotations

import sys

import pytest
import tyro

from helpers.pipelines.refusals import Told, teller
from pipelines.config.jobs import EmbedConfig
from pipelines.runtime.parsing import parsed

PLACES = ["--artifact", "a", "--data", "b", "--out", "c"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return teller(monkeypatch, capsys)


def parse(*flags: str) -> EmbedConfig:
    return parsed(lambda: tyro.cli(EmbedConfig, args=[*PLACES, *flags]))


def test_what_is_right_is_returned() -> None:
    assert parse("--stride", "3").stride == 3


def test_a_refused_value_is_raised_without_a_box(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^--stride: must be positive$"):
        parse("--stride", "0")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--strid", "3"], "--stride"),  # it knows a better name
        (["--stride", "three"], "three"),
        (["--pooling", "max"], "patches"),
    ],
)
def test_wrong_usage_is_told_by_the_parser(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_what_a_parser_prints_besides_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(lambda: print("a warning", file=sys.stderr)) is None
    assert capsys.readouterr().err == "a warning\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["pretrain", "debug", "--model.patch-size", "0"], "--model.patch-size: must be positive"),
        (["pretrain", "debug", "--run.name", "../x"], "must stay inside --run.storage"),
        (["ingest", "--source", "a", "--out", "b", "--quality", "0"], "--quality: must be between"),
    ],
)
def test_every_command_tells_its_checks_in_three_lines(
    command: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: Told = teller(monkeypatch, capsys)
    assert said in told(*command)
