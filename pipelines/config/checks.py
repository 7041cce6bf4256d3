"""Validation that names the flag at fault."""

from __future__ import annotations


def require(condition: bool, flag: str, message: str) -> None:
    """Raises ValueError with `message`, headed by the flag, unless `condition` holds."""
    if not condition:
        raise ValueError(f"--{flag}: {message}")


def require_range(bounds: tuple[float, float], flag: str, low: float, high: float) -> None:
    """Raises ValueError unless `low < bounds[0] <= bounds[1] <= high`."""
    ok = low < bounds[0] <= bounds[1] <= high
    require(ok, flag, f"must satisfy {low} < low <= high <= {high}, got {bounds}")
