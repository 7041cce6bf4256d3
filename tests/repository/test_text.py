"""Lines of Markdown are at most 100 characters, as ruff checks of Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.repository import ROOT

MOST = 100
FOLDERS = ("", "docs", "benchmarks", "benchmarks/data", "benchmarks/language")
FOLDERS += ("benchmarks/serving", "benchmarks/training")
DOCUMENTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]


def long_lines(text: str) -> list[str]:
    """Returns the lines of prose that are too long: not those of tables, code blocks and links."""
    found, in_code = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            in_code = not in_code
        cannot_break = line.lstrip().startswith("|") or " " not in line.lstrip("-* ")
        if not in_code and not cannot_break and len(re.sub(r"\]\([^)]*\)", "]", line)) > MOST:
            found.append(line)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_of_documents(path: Path) -> None:
    assert long_lines(path.read_text()) == []


def test_a_long_line_is_found() -> None:
    long = "word " * 21
    assert long_lines(f"short\n{long}\n| {long} |\n```\n{long}\n```\n") == [long]
