"""Finds the checkpoint a run resumes from, and takes a run back to an older one on request.

A run resumes from its newest checkpoint, or with --run.resume-from from the newest whole or a named
one. Going back changes the run's folder so that Ray Train and every reader see a run that has just
reached that checkpoint: newer checkpoints are moved to `set-aside-<n>/` with a copy of
metrics.jsonl, and Ray Train's list is rewritten with those that are left. Nothing is deleted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.train import NEWEST_WHOLE
from pipelines.runs.checkpoint_format import recover_report
from pipelines.runs.checkpoint_list import (
    LIST,
    Listed,
    folders,
    read_list,
    step_of,
    survey,
    unusable,
)
from pipelines.runs.integrity import find_fault, read_description
from pipelines.runs.run_folder import METRICS
from pipelines.runtime.uris import is_local, join_uri, open_uri, write_atomic

ADVICE = (
    f"Go on with --run.resume-from {NEWEST_WHOLE} (or the name of a whole one), or start a new run "
    "with another --run.name."
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint a run resumes from, and the changes its folder needs before."""

    run_uri: str
    name: str | None
    """Name of the checkpoint; None if the run has none yet."""
    newer: tuple[str, ...] = ()
    """Names of the checkpoints after it, which are set aside."""
    mend: bool = False
    """Whether Ray Train's list has to be rewritten."""
    note: str | None = None
    """A line for the user before workers start."""

    @property
    def uri(self) -> str | None:
        """URI of the checkpoint."""
        return join_uri(self.run_uri, self.name) if self.name else None


def find_start(run_uri: str, resume_from: str | None, first_step: int) -> Start:
    """Finds the checkpoint a run resumes from, without changing anything.

    Args:
        run_uri: The run's folder.
        resume_from: Value of `--run.resume-from`.
        first_step: Step of the run's first checkpoint.

    Raises:
        CheckpointError: The checkpoint or the list is damaged or missing; the message says which
            checkpoints are whole, and which flag to use.
    """
    try:
        listed, problem = _read_for_ray(run_uri), None
    except ValueError as error:
        listed, problem = None, f"{LIST}, Ray's list of its checkpoints: {error}"
    if resume_from is not None:
        return _asked_for(run_uri, resume_from, listed)
    there = folders(run_uri)
    if problem is None and not listed:
        # A run killed while its very first checkpoint was uploaded has lost nothing else.
        unfinished = there == [f"checkpoint_{first_step:08d}"] and _fault(run_uri, there[0])
        if not there or unfinished:
            return Start(run_uri=run_uri, name=None)
        problem = f"{LIST}, Ray's list of its checkpoints, is missing"
    if listed:
        newest = listed[-1][0]
        fault = _fault(run_uri, newest)
        if fault is None:
            gone = {name for name, _ in listed} - set(there)
            return Start(run_uri=run_uri, name=newest, mend=bool(gone))
        problem = f"its newest checkpoint {newest} is not whole: {fault}"
    assert problem
    raise unusable(run_uri, problem, ADVICE)


def _fault(run_uri: str, name: str) -> str | None:
    return find_fault(join_uri(run_uri, name))


def _asked_for(run_uri: str, resume_from: str, listed: Listed | None) -> Start:
    found = survey(run_uri)
    whole = [name for name, fault in found.items() if fault is None]
    if resume_from == NEWEST_WHOLE:
        if not found:  # the run has not begun
            return Start(run_uri=run_uri, name=None)
        if not whole:
            problem = f"--run.resume-from {resume_from}: no checkpoint is whole"
            raise unusable(run_uri, problem, "Start a new run with another --run.name.")
        name = whole[-1]
    elif resume_from not in whole:
        fault = found.get(resume_from, "the run has no such checkpoint")
        raise unusable(run_uri, f"--run.resume-from {resume_from}: {fault}", ADVICE)
    else:
        name = resume_from
    there = folders(run_uri)
    newer = tuple(n for n in there if step_of(n) > step_of(name))
    names = [n for n, _ in listed or []]
    mend = not names or names[-1] != name or not set(names) <= set(there)
    return Start(run_uri=run_uri, name=name, newer=newer, mend=mend)


def go_back(start: Start, *, ranked: bool, say: Callable[[str], None]) -> None:
    """Changes the run's folder to that of a run that has just reached `start`.

    Nothing is deleted: newer checkpoints are moved aside.

    Args:
        start: Result of `find_start`.
        ranked: Whether the best checkpoints are kept; Ray Train's list is then ordered by score.
        say: Takes a line for the user about what was done.
    """
    if start.name is None or not (start.newer or start.mend):
        return
    if start.newer:
        place = _set_aside(start)
        say(f"going back to {start.name}: {', '.join(start.newer)} moved to {place}")
    kept = {n: f for n, f in survey(start.run_uri).items() if step_of(n) <= step_of(start.name)}
    write_list(start.run_uri, [n for n, fault in kept.items() if fault is None], ranked=ranked)
    left_out = [f"{name} ({fault})" for name, fault in kept.items() if fault is not None]
    without = f", without {', '.join(left_out)}" if left_out else ""
    say(f"{join_uri(start.run_uri, LIST)} written anew{without}")


def _set_aside(start: Start) -> str:
    """Moves newer checkpoints to a new folder, whose name is returned.

    metrics.jsonl is copied there, because the lines of those steps are going to be replaced.
    """
    fs, path = open_uri(start.run_uri)
    names = (f"set-aside-{n}" for n in itertools.count(1))
    place = next(name for name in names if not fs.exists(f"{path}/{name}"))
    fs.makedirs(f"{path}/{place}", exist_ok=True)
    if fs.exists(f"{path}/{METRICS}"):
        fs.cp_file(f"{path}/{METRICS}", f"{path}/{place}/{METRICS}")
    for name in start.newer:
        _move(fs, f"{path}/{name}", f"{path}/{place}/{name}")
    return place


def _move(fs: Any, source: str, target: str) -> None:
    if is_local(fs):
        Path(source).rename(target)
        return
    for file in fs.find(source):  # copy every file before removing any
        fs.cp_file(file, target + str(file).removeprefix(source))
    fs.rm(source, recursive=True)


def _read_for_ray(run_uri: str) -> Listed | None:
    """Like `read_list`, but the installed version of Ray Train must be able to read the list too.

    Raises:
        ValueError: The list cannot be read.
    """
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager

    listed = read_list(run_uri)
    if listed is None:
        return None
    fs, path = open_uri(run_uri)
    values = json.loads(fs.cat_file(f"{path}/{LIST}"))
    try:
        state: Any = checkpoint_manager._CheckpointManagerState.model_validate(values)
    except ValueError as error:
        raise ValueError(
            f"written by Ray {values.get('ray_version', 'of an unknown version')}, and not "
            "readable by this one"
        ) from error
    newest = state.latest_checkpoint_result
    counted = len(state.checkpoint_report_indices) == len(state.checkpoint_results)
    if not counted or (newest and newest.checkpoint_dir_name not in dict(listed)):
        raise ValueError("its parts contradict each other")
    return listed


def write_list(run_uri: str, names: list[str], *, ranked: bool) -> None:
    """Writes Ray Train's list of a run's checkpoints.

    Args:
        run_uri: The run's folder.
        names: Names of whole checkpoints by step; the last one is the newest.
        ranked: Whether to order them by score, as Ray Train does if it keeps the best.
    """
    # Only this function knows the format; Ray has no public function that writes it.
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    fs, path = open_uri(run_uri)
    results = [
        _TrainingResultState(
            checkpoint_dir_name=name,
            metrics=recover_report(*read_description(fs, f"{path}/{name}")),
        )
        for name in names
    ]
    numbered = list(enumerate(results))
    if ranked:
        numbered.sort(key=lambda item: (item[1].metrics["score"], item[0]))
    state = _CheckpointManagerState(
        checkpoint_results=[result for _, result in numbered],
        checkpoint_report_indices=[index for index, _ in numbered],
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    write_atomic(fs, f"{path}/{LIST}", state.model_dump_json().encode())
