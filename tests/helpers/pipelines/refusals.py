"""What the tests of refused command lines share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest

from pipelines.runtime.errors import MOST_LINES, TRACEBACK

Told = Callable[..., str]


def teller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Returns what runs a command line that must be refused, and gives what it says on stderr."""
    monkeypatch.delenv(TRACEBACK, raising=False)

    def run(command: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        with pytest.raises(SystemExit) as refused:
            importlib.import_module(f"pipelines.{command}").main()
        said = refused.value.code
        assert isinstance(said, str), said  # the interpreter prints it and exits with 1
        assert said.startswith("error: ")
        assert len(said.splitlines()) <= MOST_LINES, said
        printed = capsys.readouterr()
        assert printed.err == "", printed.err
        return said

    return run
