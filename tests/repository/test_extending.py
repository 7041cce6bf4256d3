"""docs/extending.md: its examples, applied to a copy of the packages, add one of each thing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.repository import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"^```(python|diff) (\S+)\n(.*?)^```$", re.M | re.S)
CHECKS = ROOT / "tests" / "helpers" / "extended.py"


@dataclass(frozen=True)
class Edit:
    """One code block of the page: a new file, or a change of an existing one."""

    section: str
    is_new: bool
    path: str
    text: str


def edits(page: str) -> list[Edit]:
    """Returns the code blocks that name a file, in order, with the section each stands in."""
    found = []
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        title = section.partition("\n")[0]
        for language, path, text in BLOCK.findall(section):
            found.append(Edit(title, language == "python", path, text))
    return found


def apply(edit: Edit, root: Path) -> None:
    """Writes a new file, or makes the change of a `diff` block where its context stands, once."""
    path = root / edit.path
    if edit.is_new:
        assert not path.exists(), edit.path
        path.write_text(edit.text)
        return
    lines = edit.text.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(before) == 1, f"{edit.path} has {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with every example of the page applied."""
    root = tmp_path_factory.mktemp("extended")
    for package in ("models", "pipelines", "serve"):
        leave = shutil.ignore_patterns("__pycache__", "sample", "sample_video")
        shutil.copytree(ROOT / package, root / package, ignore=leave)
    for edit in edits(PAGE):
        apply(edit, root)
    return root


def test_the_examples_work(extended: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(CHECKS), str(extended)]  # -P: not with its own folder
    done = subprocess.run(command, env=env, cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    titles = list(dict.fromkeys(edit.section for edit in edits(PAGE)))
    assert done.stdout.split("\n")[:-1] == titles


def test_the_table_counts_the_files_of_each_example() -> None:
    rows = dict(re.findall(r"^\| \[([^]]+)\]\([^)]*\) \| (\d+) \|", PAGE, re.M))
    counted: dict[str, set[str]] = {}
    for edit in edits(PAGE):
        counted.setdefault(edit.section, set()).add(edit.path)
    assert {title: int(count) for title, count in rows.items()} == {
        title: len(paths) for title, paths in counted.items()
    }


def test_a_change_whose_place_is_gone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one\n")
    with pytest.raises(AssertionError, match="0 times"):
        apply(Edit("s", False, "a.py", " two\n+three\n"), tmp_path)
