"""Resident memory of Serve's processes on this machine, for the benchmarks of long connections."""

from __future__ import annotations

import os
from pathlib import Path


def resident_mib(names: tuple[str, ...]) -> dict[str, float]:
    """MiB of the processes whose title, as Ray sets it, contains a name; 0 where there is none."""
    found = dict.fromkeys(names, 0.0)
    for process in Path("/proc").iterdir():
        try:
            title = (process / "cmdline").read_bytes().decode(errors="replace")
            pages = int((process / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            continue
        for name in names:
            if title.startswith("ray::") and name in title:
                found[name] += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return found
