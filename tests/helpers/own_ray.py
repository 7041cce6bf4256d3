"""The environment of a program that starts a Ray of its own."""

from __future__ import annotations

import os

FRUGAL = {
    # Ray's workers run at nice 15 by default. Beside the other half of the suite they would starve.
    "RAY_worker_niceness": "0",
    # How often Ray Train looks at its workers and commits checkpoints: runs last seconds here.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
"""Settings of Ray that every Ray of the suite has."""


def without_ray() -> dict[str, str]:
    """Returns the environment of this process without its own Ray, with `FRUGAL`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | FRUGAL
