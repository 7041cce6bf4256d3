"""Finds the checkpoint a run resumes from, and takes a run back to it where it is not the newest.

A run resumes from the newest whole checkpoint in its folder, or from the one that --run.resume-from
names. Going back changes the folder so that Ray Train and every reader see a run that has just
reached that checkpoint: newer checkpoints are moved to `set-aside-<n>/` with a copy of
metrics.jsonl, and Ray Train's list is rewritten with those that are left. Only what is left of
uploads that were cut off is deleted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config.run import NEWEST_WHOLE
from pipelines.runs.checkpoint_format import recover_report
from pipelines.runs.checkpoint_list import (
    LIST,
    NAME,
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
    f"Leave --run.resume-from out (or say {NEWEST_WHOLE}) to go on from the newest whole one, or "
    "start a new run with another --run.name."
)
NONE_WHOLE = (
    "Copy one of them back from where it is whole, or start a new run with another --run.name."
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint a run resumes from, and the changes its folder needs before."""

    run_uri: str
    name: str | None
    """Name of the checkpoint; None if the run has none yet."""
    faults: dict[str, str | None] = field(default_factory=dict)
    """Names of the checkpoints after it, newest first, and why each is not whole; None if it is."""
    listed: frozenset[str] = frozenset()
    """Names on Ray Train's list."""
    problem: str | None = None
    """Why Ray Train's list cannot be read."""
    mend: bool = False
    """Whether Ray Train's list has to be rewritten."""
    note: str | None = None
    """A line for the user before workers start."""

    @property
    def uri(self) -> str | None:
        """URI of the checkpoint."""
        return join_uri(self.run_uri, self.name) if self.name else None

    def never_listed(self, name: str) -> bool:
        """Whether a checkpoint was not committed, as far as the list can tell."""
        return self.problem is None and name not in self.listed


def find_start(
    run_uri: str,
    resume_from: str | None,
    first_step: int,
    damaged: Mapping[str, str] | None = None,
) -> Start:
    """Finds the checkpoint a run resumes from, without changing anything.

    The run's folder is the truth: the newest checkpoint in it that is whole, whatever Ray Train's
    list says. A folder that was uploaded and not yet listed counts if all of its files are there.

    Args:
        run_uri: The run's folder.
        resume_from: Value of `--run.resume-from`.
        first_step: Step of the run's first checkpoint.
        damaged: Names of checkpoints that did not load although their headers are right, and why.

    Raises:
        CheckpointError: No checkpoint is whole, or the one asked for is not; the message says which
            are, and what to do.
    """
    try:
        listed, problem = _read_for_ray(run_uri), None
    except ValueError as error:
        listed, problem = None, str(error)
    known = [name for name, _ in listed or () if NAME.fullmatch(name)]
    there = folders(run_uri)
    faults: dict[str, str | None] = {}
    for name in sorted({*there, *known}, key=step_of, reverse=True):
        fault = (damaged or {}).get(name) or find_fault(join_uri(run_uri, name))
        if fault is None and resume_from in (None, NEWEST_WHOLE, name):
            return Start(
                run_uri=run_uri,
                name=name,
                faults=faults,
                listed=frozenset(known),
                problem=problem or (None if known else "it is missing"),
                mend=known[-1:] != [name] or set(known) != set(there),
            )
        faults[name] = fault
    if resume_from not in (None, NEWEST_WHOLE):
        fault = faults.get(resume_from, "the run has no such checkpoint")
        raise unusable(run_uri, f"--run.resume-from {resume_from}: {fault}", ADVICE)
    # A run killed while its very first checkpoint was uploaded has lost nothing else.
    unfinished = there == [f"checkpoint_{first_step:08d}"] and not known
    if problem or (faults and not unfinished):
        raise unusable(run_uri, "no checkpoint is whole", NONE_WHOLE, damaged)
    return Start(run_uri=run_uri, name=None, faults=faults)


def go_back(start: Start, *, ranked: bool, say: Callable[[str], None]) -> None:
    """Changes the run's folder to that of a run that has just reached `start`.

    Newer checkpoints and damaged ones are moved aside, never deleted. What is left of uploads that
    were cut off, and so were never listed, is removed.

    Args:
        start: Result of `find_start`.
        ranked: Whether the best checkpoints are kept; Ray Train's list is then ordered by score.
        say: Takes a line for the user about what was done.
    """
    if not (start.faults or start.mend):
        return
    fs, path = open_uri(start.run_uri)
    there, found = set(folders(start.run_uri)), dict(start.faults)
    if start.name is not None:
        last = step_of(start.name)
        found |= {n: why for n, why in survey(start.run_uri).items() if step_of(n) <= last}
    bad = {n: why for n, why in found.items() if why or n in start.faults}
    cut_off = [n for n, why in bad.items() if why and n in there and start.never_listed(n)]
    for name in cut_off:
        fs.rm(f"{path}/{name}", recursive=True)
    aside = [name for name in bad if name in there and name not in cut_off]
    told = [f"{name} is missing" for name in bad if name not in there]
    if aside:
        names = ", ".join(f"{name} ({bad[name] or 'whole'})" for name in aside)
        told.append(f"{names} moved to {_set_aside(start.run_uri, aside)}")
    if cut_off:
        told.append(f"{', '.join(cut_off)} removed, whose upload was cut off")
    if start.name is not None:
        write_list(start.run_uri, [name for name in found if name not in bad], ranked=ranked)
        told += [f"{LIST} written anew ({start.problem})"] if start.problem else []
    if told:
        say(f"going on from {start.name or 'the beginning'}: {'; '.join(told)}")


def _set_aside(run_uri: str, newer: Iterable[str]) -> str:
    """Moves newer checkpoints to a new folder, whose name is returned.

    metrics.jsonl is copied there, because the lines of those steps are going to be replaced.
    """
    fs, path = open_uri(run_uri)
    names = (f"set-aside-{n}" for n in itertools.count(1))
    place = next(name for name in names if not fs.exists(f"{path}/{name}"))
    fs.makedirs(f"{path}/{place}", exist_ok=True)
    if fs.exists(f"{path}/{METRICS}"):
        fs.cp_file(f"{path}/{METRICS}", f"{path}/{place}/{METRICS}")
    for name in newer:
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
