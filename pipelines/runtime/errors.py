"""Runs a command; an error that the user can fix is printed in at most three lines.

    def main() -> None:
        run_command(lambda: tyro.cli(IngestConfig), ingest)

The lines name the flag, the value and what to do. Any other error is a bug of ours and shows its
traceback; RAYJEPA_TRACEBACK=1 always shows it. The exit code is 1, or tyro's 2 for wrong usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipelines.config.places import Place, places
from pipelines.runtime.faults import Fault, faults_of
from pipelines.runtime.parsing import parsed
from pipelines.runtime.places import absolute, holding, watched
from pipelines.runtime.ray_faults import explain_peers, explain_ray
from pipelines.runtime.storage_faults import explain_storage

C = TypeVar("C")
TRACEBACK = "RAYJEPA_TRACEBACK"
MOST_LINES = 3
OURS = ("pipelines", "models", "serve", "__main__")
"""Packages whose error classes have messages for users; a running command is `__main__`."""


class FetchError(RuntimeError):
    """A program or service that data is fetched with is missing or failed."""


def run_command(parse: Callable[[], C], job: Callable[[C], Any], *, configs: Any = None) -> None:
    """Parses a command line and does the job; ends the process if that fails.

    Args:
        parse: Makes the configuration; tyro itself tells what is wrong with the usage, but for
            values that our own checks refuse.
        job: Takes it.
        configs: Returns the dataclasses whose fields name places, given what `parse` returned; None
            if that is such a dataclass itself.

    Raises:
        SystemExit: With 1, after an error that the user can fix.
        Exception: A bug of ours.
    """
    found: list[Place] = []
    try:
        config = parsed(parse)
        found = _places(configs(config) if configs else (config,))
        with watched(found):
            job(config)
    except BrokenPipeError:  # `| head` has read enough; the interpreter would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        told = None if os.environ.get(TRACEBACK) else explain(error, found)
        if told is None:
            raise
        sys.stdout.flush()
        lines = [line for line in told.splitlines() if line.strip()]
        sys.exit("error: " + "\n".join(lines[:MOST_LINES]))


def _places(configs: tuple[Any, ...]) -> list[Place]:
    """Returns places as given and in absolute form, because messages may contain either."""
    given = places(*configs)
    try:
        return given + places(*(absolute(config) for config in configs))
    except ValueError:  # an invalid address, which is already being reported
        return given


def explain(error: BaseException, found: list[Place]) -> str | None:
    """Returns the message for an error.

    Args:
        error: The error as raised here; Ray's wrappers around errors of tasks are removed.
        found: The places of the configuration.

    Returns:
        Lines that name the flag, the value and the way out; None for a fault of ours.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from what is done"
    faults = list(faults_of(error))
    for fault in faults:
        told = _explain_one(fault, found)
        if told:
            return told
    return next(filter(None, map(explain_ray, faults)), None) or explain_peers(faults)


def _explain_one(fault: Fault, found: list[Place]) -> str | None:
    """Explains what is not a loss, because a loss may be what followed from it."""
    if fault.module == "ray" and not fault.is_a("OutOfMemoryError"):
        return None
    return explain_storage(fault, found) or _explain_other(fault, found)


def _explain_other(fault: Fault, found: list[Place]) -> str | None:
    if fault.is_a("ModuleNotFoundError") and fault.package not in OURS:
        return f"the package {fault.package} is missing: pip install {fault.package}"
    if fault.is_a("OutOfMemoryError", "MemoryError"):
        advice = "give the job fewer workers, a smaller batch, or a larger machine"
        return f"out of memory: {advice}\n{fault.first_line}"
    if fault.is_a("ValueError", "UnsupportedOperation") or fault.module in OURS:
        return _with_flag(fault, found) + _whence(fault)
    if fault.is_a("TransportError", "ConnectionError", "TimeoutError"):  # httpx's and Python's
        return _with_flag(fault, found)
    return None


def _with_flag(fault: Fault, found: list[Place]) -> str:
    """Returns the error's text, after the flag of the place it is about unless it names one."""
    place = holding(found, fault.text)
    if place is None or ("--" in fault.text and not fault.text.startswith(place.uri)):
        return fault.text
    return f"{place.flag}: {fault.text}"


def _whence(fault: Fault) -> str:
    """Names the origin of a message that is not ours, which the user may not understand."""
    if fault.raised_in is None or ROOT in fault.raised_in.parents:
        return ""
    return f"\n({fault.name} in {fault.raised_in.name}; {TRACEBACK}=1 shows where)"


ROOT = Path(__file__).resolve().parent.parent.parent
