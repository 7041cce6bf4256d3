"""The door that every command line goes through: what a person can mend is told in three lines at most.

    def main() -> None:
        run_command(lambda: tyro.cli(IngestConfig), ingest)

What is told: the flag, the value, the way out. Whatever else goes wrong is a fault of ours and shows its
traceback; RAYJEPA_TRACEBACK=1 shows it always. Exit codes: 1, and 2 from tyro for the usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipelines.config.places import Place, places
from pipelines.runtime.faults import Fault, faults_of
from pipelines.runtime.places import absolute, holding
from pipelines.runtime.storage_faults import explain_storage

C = TypeVar("C")
TRACEBACK = "RAYJEPA_TRACEBACK"
MOST_LINES = 3
OURS = ("pipelines", "models", "serve", "__main__")
"""Where classes of errors are defined whose words are for people; a command that runs is `__main__`."""


class FetchError(RuntimeError):
    """A program or service that brings data is missing or failed."""


def run_command(parse: Callable[[], C], job: Callable[[C], Any], *, configs: Any = None) -> None:
    """Parses a command line and does the job; ends the process if that fails.

    Args:
        parse: Makes the configuration; tyro itself tells what is wrong with the usage.
        job: Takes it.
        configs: Makes of what `parse` returned the dataclasses whose fields name places, for one that
            is none itself.

    Raises:
        SystemExit: with 1, when what went wrong has been told.
        Exception: a fault of ours.
    """
    found: list[Place] = []
    try:
        config = parse()
        found = _places(configs(config) if configs else (config,))
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
    """As they were given and, since messages have them so, absolute."""
    given = places(*configs)
    try:
        return given + places(*(absolute(config) for config in configs))
    except ValueError:  # one of them is no address; that is being told
        return given


def explain(error: BaseException, found: list[Place]) -> str | None:
    """What to say of an error.

    Args:
        error: As it was raised here; Ray's wrappers of what a task or worker met are taken off.
        found: The places of the configuration.

    Returns:
        Lines that name the flag, the value and the way out; None for a fault of ours.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from what is done"
    for fault in faults_of(error):
        told = explain_storage(fault, found) or _explain_other(fault, found)
        if told:
            return told
    return None


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
    """Its own words, after the flag of the place they are about unless they name one."""
    place = None if "--" in fault.text else holding(found, fault.text)
    return f"{place.flag}: {fault.text}" if place else fault.text


def _whence(fault: Fault) -> str:
    """Where words that are not ours come from: they may be about nothing the user knows."""
    if fault.raised_in is None or ROOT in fault.raised_in.parents:
        return ""
    return f"\n({fault.name} in {fault.raised_in.name}; {TRACEBACK}=1 shows where)"


ROOT = Path(__file__).resolve().parent.parent.parent
