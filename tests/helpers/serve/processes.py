"""The processes of Serve's replicas on this machine."""

from __future__ import annotations

from pathlib import Path


def replica_pids(app: str, deployment: str) -> list[int]:
    """Returns the process ids of a deployment's replicas."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            name = (folder / "cmdline").read_bytes()
        except OSError:  # not a process, or gone
            continue
        if name.startswith(f"ray::ServeReplica:{app}:{deployment}".encode()):
            found.append(int(folder.name))
    return found
