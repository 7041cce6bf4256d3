"""The list of a run's checkpoints: those that Ray Train has committed, and those whole on disk.

A checkpoint counts once Ray Train has added it to `checkpoint_manager_snapshot.json`, which Ray
Train rewrites in place. If this list is lost or damaged, readers of the run get an error that says
which checkpoints are whole; `pipelines.runs.resuming` writes the list anew when the run goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pipelines.runs.checkpoint_format import CheckpointError
from pipelines.runs.integrity import find_fault
from pipelines.runtime.uris import join_uri, open_uri

LIST = "checkpoint_manager_snapshot.json"
NAME = re.compile(r"checkpoint_(\d+)")
SHOWN = 4
"""Most checkpoints that a message names, among the whole ones and among the damaged ones."""

Listed = list[tuple[str, dict[str, Any]]]
"""Names of checkpoints with the metrics reported for them, oldest first."""


def read_list(run_uri: str) -> Listed | None:
    """Reads Ray Train's list of a run's checkpoints; None if there is no list.

    Raises:
        ValueError: The list cannot be read; the message says why.
    """
    fs, path = open_uri(run_uri)
    try:
        text = fs.cat_file(f"{path}/{LIST}")
    except FileNotFoundError:
        return None
    if not text.strip():
        raise ValueError("it is empty")
    try:
        results = json.loads(text)["checkpoint_results"]
        found = [(str(r["checkpoint_dir_name"]), dict(r["metrics"])) for r in results]
        return sorted(found, key=lambda item: int(item[1]["step"]))
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error) if isinstance(error, ValueError) else "not the list that Ray writes"
        raise ValueError(f"it is damaged ({reason})") from error


def committed_checkpoints(run_uri: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns (URI, reported metrics) of each of a run's checkpoints, oldest first.

    Raises:
        CheckpointError: The list of checkpoints cannot be read.
    """
    try:
        listed = read_list(run_uri)
    except ValueError as error:
        raise unusable(run_uri, f"{LIST}: {error}", _name_one(run_uri)) from error
    return [(join_uri(run_uri, name), metrics) for name, metrics in listed or []]


def best_checkpoint(run_uri: str) -> str | None:
    """URI of a run's best checkpoint by online kNN, else of its newest; None if it has none."""
    found = committed_checkpoints(run_uri)
    best = max(found, key=lambda c: (c[1].get("knn", -1.0), c[1]["step"]), default=None)
    return best[0] if best else None


def resolve_checkpoint(uri: str) -> str:
    """Returns the URI of the checkpoint that `uri` names, directly or by its run folder.

    A run folder stands for its best checkpoint by online kNN, or its newest if there are no kNN
    scores. Only checkpoints on Ray Train's list count, so half-uploaded ones do not.

    Raises:
        CheckpointError: `uri` is neither a checkpoint nor a run with one, or the checkpoint is
            damaged; then the message names the run's whole checkpoints and what to do.
    """
    uri = uri.rstrip("/")
    fs, path = open_uri(uri)
    if fs.exists(f"{path}/state.json"):
        return _usable(uri, uri)
    best = best_checkpoint(uri)
    if best is not None:
        return _usable(best, best)
    if folders(uri):
        problem = f"{LIST}, Ray's list of the run's checkpoints, is missing"
        raise unusable(uri, problem, _name_one(uri))
    if NAME.fullmatch(_name(uri)) and folders(_run_of(uri)):
        return _usable(uri, uri)
    raise CheckpointError(f"{uri}: neither a checkpoint nor a run folder with one")


def _usable(checkpoint: str, uri: str) -> str:
    fault = find_fault(checkpoint, ("model",))
    if fault is None:
        return checkpoint
    name, run_uri = _name(checkpoint), _run_of(checkpoint)
    if not NAME.fullmatch(name):  # a copy of a checkpoint, outside of any run
        raise CheckpointError(f"{uri}: the checkpoint is not whole: {fault}")
    raise unusable(run_uri, f"{name} is not whole: {fault}", _name_one(run_uri))


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _run_of(checkpoint: str) -> str:
    return checkpoint.rpartition("/")[0] or "."


def folders(run_uri: str) -> list[str]:
    """Names of the checkpoint folders in a run's folder, by step; [] if there is no run."""
    fs, path = open_uri(run_uri)
    try:
        there = fs.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {_name(str(entry)) for entry in there}
    return sorted((name for name in names if NAME.fullmatch(name)), key=step_of)


def step_of(name: str) -> int:
    """The step that a checkpoint folder's name contains."""
    found = NAME.fullmatch(name)
    assert found
    return int(found[1])


def survey(run_uri: str) -> dict[str, str | None]:
    """Checks every checkpoint that is in a run's folder or on its list.

    Returns:
        Its name to why it is not whole (None if it is), by step.
    """
    try:
        listed = [name for name, _ in read_list(run_uri) or [] if NAME.fullmatch(name)]
    except ValueError:
        listed = []
    names = sorted({*folders(run_uri), *listed}, key=step_of)
    return {name: find_fault(join_uri(run_uri, name)) for name in names}


def unusable(
    run_uri: str, problem: str, advice: str, damaged: Mapping[str, str] | None = None
) -> CheckpointError:
    """Builds an error of three lines: what is wrong, which checkpoints are whole, what to do.

    Args:
        run_uri: The run's folder.
        problem: The first line.
        advice: The last line.
        damaged: Names of checkpoints that did not load although their headers are right, and why.
    """
    found = survey(run_uri) | dict(damaged or {})
    whole = _some([name for name, fault in found.items() if fault is None])
    broken = _some([f"{name} ({fault})" for name, fault in found.items() if fault is not None])
    return CheckpointError(
        f"run {run_uri}: {_line(problem)}.\nWhole: {whole}. Not whole: {_line(broken)}.\n{advice}"
    )


def _some(names: list[str]) -> str:
    hidden = len(names) - SHOWN
    return ", ".join(([f"{hidden} older"] if hidden > 0 else []) + names[-SHOWN:]) or "none"


def _line(text: str) -> str:
    return " ".join(text.split())


def _name_one(run_uri: str) -> str:
    return (
        f"Name one that is whole instead, as {run_uri}/checkpoint_<step>, or have the run's list "
        "mended by the command that trains the run."
    )
