"""A run's checkpoints: those that Ray Train has committed to its list, and what is whole on disk.

A checkpoint counts once Ray Train has put it on its list, `checkpoint_manager_snapshot.json`, which it
rewrites in place. A list that is lost or damaged, or that names what is gone, is an error that says
what is whole; `pipelines.runs.resuming` mends it when asked to.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pipelines.runs.checkpoint_format import CheckpointError
from pipelines.runs.integrity import find_fault
from pipelines.runtime.uris import join_uri, open_uri

LIST = "checkpoint_manager_snapshot.json"
NAME = re.compile(r"checkpoint_(\d+)")
SHOWN = 4
"""Checkpoints that a message names, of the whole ones and of the others."""

Listed = list[tuple[str, dict[str, Any]]]
"""Names of checkpoints and the metrics that were reported with them, oldest first."""


def read_list(run_uri: str) -> Listed | None:
    """What Ray Train's list of a run holds; None where there is no list.

    Raises:
        ValueError: it cannot be read, saying why.
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
    """Returns (URI, metrics as reported) of a run's checkpoints, oldest first; [] if none.

    Raises:
        CheckpointError: the list of them cannot be read.
    """
    try:
        listed = read_list(run_uri)
    except ValueError as error:
        raise unusable(run_uri, f"{LIST}: {error}", _name_one(run_uri)) from error
    return [(join_uri(run_uri, name), metrics) for name, metrics in listed or []]


def best_checkpoint(run_uri: str) -> str | None:
    """The best of `committed_checkpoints` by online kNN, else the newest; None if there are none."""
    found = committed_checkpoints(run_uri)
    best = max(found, key=lambda c: (c[1].get("knn", -1.0), c[1]["step"]), default=None)
    return best[0] if best else None


def resolve_checkpoint(uri: str) -> str:
    """Returns the checkpoint a URI means: itself, or a run folder's best by online kNN.

    A run without kNN scores means its newest checkpoint. Half-uploaded ones do not count: Ray
    Train's own list of a run's committed checkpoints decides.

    Raises:
        CheckpointError: neither a checkpoint nor a run with one, or the one that is meant is not
            whole: what of the run is, and what to do.
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
    if not NAME.fullmatch(name):  # a copy of its own: no run around it
        raise CheckpointError(f"{uri}: the checkpoint is not whole: {fault}")
    raise unusable(run_uri, f"{name} is not whole: {fault}", _name_one(run_uri))


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _run_of(checkpoint: str) -> str:
    return checkpoint.rpartition("/")[0] or "."


def folders(run_uri: str) -> list[str]:
    """Names of the checkpoint folders that lie in a run, by step; [] where there is no run."""
    fs, path = open_uri(run_uri)
    try:
        there = fs.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {_name(str(entry)) for entry in there}
    return sorted((name for name in names if NAME.fullmatch(name)), key=step_of)


def step_of(name: str) -> int:
    """The step in a checkpoint folder's name."""
    found = NAME.fullmatch(name)
    assert found
    return int(found[1])


def survey(run_uri: str) -> dict[str, str | None]:
    """Every checkpoint that a run has or lists, by step: its name, and why it is not whole, or None."""
    try:
        listed = [name for name, _ in read_list(run_uri) or [] if NAME.fullmatch(name)]
    except ValueError:
        listed = []
    names = sorted({*folders(run_uri), *listed}, key=step_of)
    return {name: find_fault(join_uri(run_uri, name)) for name in names}


def unusable(run_uri: str, problem: str, way_out: str) -> CheckpointError:
    """An error of three lines: the run with what is wrong, what is whole, what to do."""
    found = survey(run_uri)
    whole = _some([name for name, fault in found.items() if fault is None])
    broken = _some([f"{name} ({fault})" for name, fault in found.items() if fault is not None])
    return CheckpointError(
        f"run {run_uri}: {_line(problem)}.\nWhole: {whole}. Not whole: {_line(broken)}.\n{way_out}"
    )


def _some(names: list[str]) -> str:
    hidden = len(names) - SHOWN
    return ", ".join(([f"{hidden} older"] if hidden > 0 else []) + names[-SHOWN:]) or "none"


def _line(text: str) -> str:
    return " ".join(text.split())


def _name_one(run_uri: str) -> str:
    return (
        f"Name one that is whole instead, as {run_uri}/checkpoint_<step>, or have the run's list "
        "mended by training on with --run.resume-from newest-whole."
    )
