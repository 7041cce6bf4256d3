"""Room on the disk where checkpoints wait for their upload, and what is said if there is none."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.scratch import host_name
from pipelines.runtime.faults import faults_of
from pipelines.worker_group.failures import FULL, FULL_TEXT

SPARE = 64 * 2**20
"""Bytes that a checkpoint leaves free: a disk that is full to the last byte stops Ray too."""


def require_room(size: int) -> None:
    """Checks that a checkpoint fits on the disk of TMPDIR.

    Args:
        size: Bytes that this process is going to write; 0 if that is not known yet.

    Raises:
        OSError: There is no room for it, or the disk is full.
    """
    place = tempfile.gettempdir()
    if size and shutil.disk_usage(place).free < size + SPARE:
        raise OSError(errno.ENOSPC, "no room for a checkpoint", place)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full; safetensors says it in words alone."""
    return any(f.number in FULL or FULL_TEXT.search(f.text) for f in faults_of(error))


@contextlib.contextmanager
def telling_room() -> Iterator[None]:
    """Adds to the error of a full disk how much of it is free; of TMPDIR if it names no place.

    Raises:
        OSError: A disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        place = getattr(error, "filename", None) or tempfile.gettempdir()
        free = _free(str(place))
        raise OSError(errno.ENOSPC, f"No space left on device ({free})", str(place)) from error


def _free(place: str) -> str:
    folder = next((p for p in (Path(place), *Path(place).parents) if p.is_dir()), Path("/"))
    usage = shutil.disk_usage(folder)
    return f"{_size(usage.free)} of {_size(usage.total)} free"


def no_room(size: int) -> str:
    """Says in which folder of which host there is no room for a checkpoint, and how much there is.

    Args:
        size: Bytes that one takes; 0 if that is not known.
    """
    place = tempfile.gettempdir()
    usage = shutil.disk_usage(place)
    needed = f" and a checkpoint takes {_size(size + SPARE)}" if size else ""
    return (
        f"{place} on host {here()} has {_size(usage.free)} of {_size(usage.total)} free"
        f"{needed}; free some there, or set TMPDIR where Ray is started"
    )


def here() -> str:
    """Returns the address and the name of this host."""
    import ray

    name = host_name()
    if not ray.is_initialized():
        return name
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return f"{address} ({name})"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
