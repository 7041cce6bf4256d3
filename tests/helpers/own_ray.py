"""The environment of programs that tests start, and of a Ray of their own."""

from __future__ import annotations

import os
from pathlib import Path

FRUGAL = {
    # Ray's workers run at nice 15 by default. Beside the other half of the suite they would starve.
    "RAY_worker_niceness": "0",
    # No processes before there is work for them: most jobs have an environment of their own, and
    # cannot use those that are there.
    "RAY_prestart_worker_first_driver": "0",
    # How often Ray Train looks at its workers and commits checkpoints: runs last seconds here.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Its watch for machines that are taken away is one process more for every run; where machines
    # are taken away, tests switch it on.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Settings of Ray that every Ray of the suite has."""


def python_path(*folders: Path | str) -> str:
    """Returns PYTHONPATH with these folders and the one whose `sitecustomize` saves time."""
    return os.pathsep.join([*map(str, folders), str(Path(__file__).parent / "site")])


def without_ray() -> dict[str, str]:
    """Returns the environment of this process without its own Ray, with `FRUGAL`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | FRUGAL
