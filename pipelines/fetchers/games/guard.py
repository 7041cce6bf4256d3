"""A program that starts another one, which then ends with whoever asked for it.

    python -IS guard.py PARENT PROGRAM ARGUMENT...

A game's engine is a process of its own. Killed outright, whoever plays cannot end it, and it would
go on for ever, with the files that it inherited open. So the kernel is told to end it (Linux), and
it inherits nothing but the standard streams. This file is run by its path and imports nothing of
the project.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when the thread that started it ends."""
STANDARD = 2
"""The last of the standard streams' descriptors."""


def main(parent: int, program: str, *arguments: str) -> None:
    """Becomes the program.

    Args:
        parent: the process that asked for it; nothing is started where it has ended already.
        program: path of the program.
        arguments: of the program.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        for descriptor in map(int, os.listdir("/dev/fd")):  # noqa: PTH208, pathlib costs time
            with contextlib.suppress(OSError):  # that of the listing is closed already
                os.set_inheritable(descriptor, descriptor <= STANDARD)
        os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
