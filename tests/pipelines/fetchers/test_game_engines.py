"""A game's engine, a process of its own, ends with whoever plays, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.fetchers.games import guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")

STARTED = """
import os, subprocess, sys, time
program = [sys.executable, "-c", "import os, time; print(os.listdir('/dev/fd')); time.sleep(60)"]
guarded = [sys.executable, "-IS", {guard!r}, str(os.getpid()), *program]
print(subprocess.Popen(guarded if {on} else program, close_fds=False).pid, flush=True)
time.sleep(60)
"""

PLAYS = """
import os, time
from pipelines.planning.games.floor_plan import read_floor_plan
from pipelines.planning.games.worlds import GAME_WORLDS
before = {name for name in os.listdir("/proc") if name.isdigit()}
player = GAME_WORLDS["my_way_home"].start()
player.reset(0)
new = [n for n in os.listdir("/proc") if n.isdigit() and n not in before]
engines = [n for n in new if b"vizdoom" in open(f"/proc/{n}/cmdline", "rb").read()]
print(*engines, flush=True)
time.sleep(60)
"""


def goes_on(pid: int) -> bool:
    """Whether a process, or what its ending leaves for its parent, is there and runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def ends(pid: int, seconds: float = 10) -> bool:
    """Waits until a process has ended; returns whether it has."""
    last = time.monotonic() + seconds
    while goes_on(pid) and time.monotonic() < last:
        time.sleep(0.05)
    return not goes_on(pid)


@pytest.mark.parametrize("on", [True, False])
def test_a_program_ends_with_who_was_killed_only_if_guarded(on: bool, tmp_path: Path) -> None:
    code = STARTED.format(guard=guard.__file__, on=on)
    kept, other = os.pipe()
    os.set_inheritable(kept, True)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, pass_fds=(kept,)
    ) as parent:
        assert parent.stdout is not None
        program = int(parent.stdout.readline())
        told = parent.stdout.readline()  # it runs
        parent.send_signal(signal.SIGKILL)
    os.close(other)
    os.close(kept)
    try:
        assert (f"'{kept}'" in told) != on
        assert ends(program, 10 if on else 0.5) == on
    finally:
        if goes_on(program):
            os.kill(program, signal.SIGKILL)


def test_nothing_is_started_for_who_has_ended_already() -> None:
    command = [sys.executable, "-IS", guard.__file__, "1", sys.executable, "-c", "print('runs')"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_dooms_engine_ends_with_who_was_killed() -> None:
    pytest.importorskip("vizdoom", reason="needs the extra `games`")
    with subprocess.Popen(
        [sys.executable, "-c", PLAYS], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        (engine,) = map(int, parent.stdout.readline().split())
        assert goes_on(engine)
        parent.send_signal(signal.SIGKILL)
        assert ends(engine)
