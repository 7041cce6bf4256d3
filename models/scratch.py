"""Temporary folders that name their owner, so that those of dead processes can be removed.

A folder is `TMPDIR/rayjepa-<machine>-<pid>-<start>-<kind>-<random>`. A process that is killed
cannot remove its own; the next one on the same machine that makes a folder does. Folders of other
machines, which may share TMPDIR, are left alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = re.compile(r"rayjepa-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-.+")


def host_name() -> str:
    """Returns this host's name, as text that every line, file and digest can hold.

    The kernel takes any 64 bytes for a name. What is no letter or sign in UTF-8 becomes U+FFFD.
    """
    name = os.fsencode(socket.gethostname()).decode(errors="replace")
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in name)


def machine() -> str:
    """Returns 8 hex digits for this host, its boot, and the namespace in which pids count."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [host_name()]
    if boot.exists():
        parts += [boot.read_text().strip(), str(space.readlink())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def start_of(pid: int) -> int:
    """Returns when a process began, in ticks since boot; 0 if that cannot be known.

    With it, a process is told from a later one that was given the same number.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_alive(pid: int, start: int) -> bool:
    """Whether the process `pid` of this machine that began at `start` still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return start_of(pid) in (0, start)


def make_scratch(kind: str) -> Path:
    """Makes a temporary folder of this process, which whoever makes it removes.

    Args:
        kind: What it is for, in its name.
    """
    _remove_stale(tempfile.gettempdir())
    owner = f"{machine()}-{os.getpid()}-{start_of(os.getpid())}"
    return Path(tempfile.mkdtemp(prefix=f"rayjepa-{owner}-{kind}-"))


@contextlib.contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """Yields a temporary folder that is removed at the end of the block."""
    folder = make_scratch(kind)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache  # once in a process
def _remove_stale(place: str) -> None:
    remove_stale(Path(place))


def remove_stale(place: Path) -> list[str]:
    """Removes the folders of processes of this machine that have ended; returns their names."""
    here, removed = machine(), []
    for folder in place.glob("rayjepa-*"):
        found = NAME.fullmatch(folder.name)
        if found is None or found["machine"] != here:
            continue
        if not is_alive(int(found["pid"]), int(found["start"])):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed
