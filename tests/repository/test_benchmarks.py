"""`benchmarks/run.py`: every benchmark is in it, and rows get into their pages."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run as runner
from benchmarks.run import BEGIN, END, KNOWN, Benchmark, benchmarks, result_of, run, write
from helpers.repository import ROOT
from helpers.waiting import LIMIT_S, wait_until

SCRIPTS = sorted(
    script
    for script in (ROOT / "benchmarks").glob("*/*.py")
    if 'if __name__ == "__main__":' in script.read_text()
)


def test_every_script_is_reachable_and_has_a_page() -> None:
    found = benchmarks()
    assert [found[script.stem].script for script in SCRIPTS] == SCRIPTS
    assert not KNOWN.keys() - found.keys()
    for name, benchmark in found.items():
        page = ROOT / "benchmarks" / benchmark.page
        assert page.is_file(), name
        assert page.read_text().startswith("# "), name


@pytest.fixture
def made(tmp_path: Path) -> Benchmark:
    script, page = tmp_path / "made.py", tmp_path / "made.md"
    script.write_text(
        "import os, sys\n"
        "print('a table', sys.argv[1:], os.path.isdir(sys.argv[1]))\n"
        "print('| ours | 1.5 |')\n"
        "sys.exit('--fail' in sys.argv)\n"
    )
    page.write_text("# A page\n\nText.\n")
    return Benchmark(script=script, page=str(page), arguments=("WORK",), result="^. ours .*")


def test_a_row_says_what_came_out_and_how(
    made: Benchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    row = run(made, ())
    assert row is not None
    result, command, commit, hardware, date = row.strip("| ").split(" | ")
    assert (result, command.endswith("made.py WORK`")) == ("ours, 1.5", True)
    assert runner._git("rev-parse", "--short", "HEAD") in commit
    assert all(word in hardware for word in ("cores of", "torch", "load"))
    assert len(date.split("-")) == 3
    assert "a table" in capsys.readouterr().out, "shown while it runs"
    assert "True]" not in row
    assert run(made, ["WORK", "--fail"]) is None


def test_rows_stand_under_the_title_the_newest_first(made: Benchmark) -> None:
    page = Path(made.page)
    for row in ("| first |", "| second |"):
        write(page, row)
    text = page.read_text()
    assert text.startswith(f"# A page\n\n{BEGIN}\n\n| result |")
    assert text.index("| second |") < text.index("| first |") < text.index(END)
    assert text.count("| result |") == 1
    assert text.endswith(f"{END}\n\nText.\n")


@pytest.mark.parametrize(
    ("pattern", "lines", "expected"),
    [
        ("^result: (.*)", ["x", "result: 1.2 times", "y"], "1.2 times"),
        ("^result: (.*)", ["x", "the last", ""], "the last"),
        (".*ours.*", ["│ ours fp32 │ 1.2x │", "reference", "│ ours bf16 │ 1.1x │"],
         "ours fp32, 1.2x; ours bf16, 1.1x"),
    ],
)  # fmt: skip
def test_the_result_is_what_the_pattern_finds(
    pattern: str, lines: list[str], expected: str
) -> None:
    assert result_of(lines, pattern) == expected


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_benchmark_ends_with_the_runner(made: Benchmark, tmp_path: Path) -> None:
    made.script.write_text(
        "import os, time\nprint(os.getpid(), flush=True)\nfor _ in range(600): time.sleep(0.1)\n"
    )
    code = (
        "import pathlib, sys\n"
        "from benchmarks import run\n"
        f"made = run.Benchmark(script=pathlib.Path({str(made.script)!r}), page={made.page!r})\n"
        "run.benchmarks = lambda: {'made': made}\n"
        "sys.argv = ['run.py', 'made']\n"
        "run.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()  # the command
    child = int(process.stdout.readline())
    process.terminate()
    assert process.wait(LIMIT_S) == 143
    wait_until(lambda: is_gone(child))


def test_what_needs_something_says_so(
    made: Benchmark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needy = dataclasses.replace(made, needs="--film FILE")
    monkeypatch.setattr(runner, "benchmarks", lambda: {"made": made, "needy": needy})
    for name, told in (("needy", "needs --film FILE"), ("other", "one of all, made, needy")):
        monkeypatch.setattr("sys.argv", ["run.py", name])
        with pytest.raises(SystemExit) as ended:
            runner.main()
        assert told in str(ended.value.code)
    monkeypatch.setattr("sys.argv", ["run.py", "all"])
    with pytest.raises(SystemExit) as ended:
        runner.main()
    assert ended.value.code == 0
    assert Path(made.page).read_text().count("made.py WORK") == 1, "and all leaves it out"
