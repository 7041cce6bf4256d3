"""Temporary folders: those of dead processes of this machine are removed, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.repository import ROOT
from models.scratch import NAME, host_name, machine, make_scratch, remove_stale, scratch, start_of

LEAVE_ONE = "from models.scratch import make_scratch; import os; print(make_scratch('left')); {end}"


def leave_one(tmp_path: Path, end: str) -> Path:
    """A process of its own that makes a folder and ends."""
    code = LEAVE_ONE.format(end=end)
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return Path(done.stdout.strip())


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    left = leave_one(tmp_path, "os.kill(os.getpid(), 9)")
    assert left.is_dir()
    (left / "gigabytes").write_bytes(b"x")
    again = leave_one(tmp_path, "os._exit(0)")
    assert not left.exists()
    assert again.is_dir()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"Node_A7", "Node_A7"),
        ("h\u00f6he".encode(), "h\u00f6he"),
        (b"h\xf6he", "h\ufffdhe"),  # Latin-1
        (b"two\nlines", "two\ufffdlines"),
        (b"n" * 64, "n" * 64),
    ],
)
def test_a_host_may_have_any_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: bytes, shown: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: os.fsdecode(name))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert host_name() == shown
    assert host_name().encode()
    assert NAME.fullmatch(make_scratch("odd").name)


def test_folders_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = make_scratch("mine")
    pid, start = os.getpid(), start_of(os.getpid())
    stay = [f"rayjepa-00000000-999999-1-far-{pid}", "rayjepa-notes", "other-tool"]
    go = [f"rayjepa-{machine()}-{pid}-{start + 1}-reused", f"rayjepa-{machine()}-4194305-1-dead"]
    for name in (*stay, *go):
        (tmp_path / name).mkdir()
    assert sorted(remove_stale(tmp_path)) == sorted(go)
    assert {p.name for p in tmp_path.iterdir()} == {*stay, mine.name}


def test_a_block_leaves_nothing_even_if_it_fails(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept: list[Path] = []

    def fail() -> None:
        with scratch("copy") as folder:
            kept.append(folder)
            (folder / "part").write_bytes(b"x")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert NAME.fullmatch(kept[0].name)
    assert list(tmp_path.iterdir()) == []
