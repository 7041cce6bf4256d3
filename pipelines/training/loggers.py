"""Loggers of a run: metrics.jsonl, TensorBoard, sample log, step timer and progress line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.scratch import host_name
from pipelines.runs.run_folder import METRICS, RunFolder, read_metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PHASES = ("data", "forward", "backward", "optimizer")


class MetricsLog:
    """Appends metrics to metrics.jsonl and TensorBoard, continuing after `start_step`.

    Lines after `start_step` belong to steps that are about to be repeated, so they are dropped. At
    `start_step` 0 all lines are dropped, including the one written before the first step.
    """

    def __init__(self, folder: RunFolder, start_step: int) -> None:
        path = folder.fetch(METRICS)
        kept = [row for row in read_metrics(path) if start_step and row["step"] <= start_step]
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        rewritten.replace(path)
        self._file = path.open("a")
        self._board = _tensorboard(folder.local / "tensorboard", start_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the metrics of a step (null if not finite); numbers go to TensorBoard too."""
        # NaN is not JSON.
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None
            for k, v in values.items()
        }
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flushes both logs to disk."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """Closes both logs."""
        self._file.close()
        self._board.close()


def _tensorboard(folder: Path, start_step: int) -> SummaryWriter:
    # Slow to import, and only rank 0 needs it.
    from torch.utils.tensorboard import SummaryWriter

    with _host_name_for_files():
        return SummaryWriter(str(folder), purge_step=start_step + 1)


@contextlib.contextmanager
def _host_name_for_files() -> Iterator[None]:
    """Lets TensorBoard, which names its file after the host, meet a name that a file may have."""
    asked, name = socket.gethostname, host_name().replace("/", "_")
    socket.gethostname = lambda: name
    try:
        yield
    finally:
        socket.gethostname = asked


class SampleLog:
    """Writes the samples of each step for audits: one line per step and process.

    `attempt` is equal on all processes of one attempt at training and grows with every restart. If
    a step has lines of several attempts, the largest attempt produced the final weights.
    """

    def __init__(self, folder: RunFolder, rank: int, attempt: int) -> None:
        self._file = (folder.local / f"samples-rank{rank}-{attempt}.jsonl").open("a")
        self._rank, self._attempt = rank, attempt

    def write(self, step: int, sample_ids: Sequence[Any]) -> None:
        """Adds the samples of optimizer step `step` (counted from 1), in batch order."""
        ids = [bytes(i).ljust(16, b"\0").hex() for i in sample_ids]
        who = {"rank": self._rank, "attempt": self._attempt, "pid": os.getpid()}
        self._file.write(json.dumps({"step": step, **who, "time": time.time(), "ids": ids}) + "\n")
        self._file.flush()


class StepTimer:
    """Splits the time of a step into `PHASES` by the device's clock, without a host sync.

    On CUDA the marks are events on the stream, so "data" is the time the device was idle because no
    batch was ready; the host may wait longer without harm. `totals` synchronises with the device,
    so call it where metrics are read anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.start()

    def start(self) -> None:
        """Begins a step; the time since the last mark counts to no phase."""
        self.mark("")

    def mark(self, phase: str) -> None:
        """Ends the phase that began at the previous mark."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def totals(self) -> dict[str, float]:
        """Returns the seconds of each phase since the last call, and resets."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] += (
                    before.elapsed_time(after) / 1000 if self._cuda else after - before
                )
        self._marks = []
        return seconds


def speed(phase_seconds: Mapping[str, float], samples: int, device: torch.device) -> dict[str, Any]:
    """Returns throughput, each phase's share of the step time, and peak memory as metrics."""
    total = sum(phase_seconds.values()) or math.nan
    values = {"samples_per_s": samples / total, "data_wait_share": phase_seconds["data"] / total}
    values |= {f"{name}_share": phase_seconds[name] / total for name in PHASES[1:]}
    if device.type == "cuda":
        values["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    else:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        values["peak_memory_bytes"] = kib * (1 if sys.platform == "darwin" else 1024)
    return values


def progress_line(step: int, total: int, values: Mapping[str, Any], seconds_left: float) -> str:
    """The line shown to the user: `step 120/500 loss 0.312 rankme 45.1 knn 31.2% 812 img/s ...`."""
    parts = [f"step {step}/{total}"]
    shown = [
        ("loss", "loss {:.4f}", 1),
        ("rankme", "rankme {:.1f}", 1),
        ("knn", "knn {:.1f}%", 100),
        ("samples_per_s", "{:.0f} img/s", 1),
        ("data_wait_share", "wait {:.0f}%", 100),
    ]
    parts += [text.format(scale * values[k]) for k, text, scale in shown if k in values]
    if math.isfinite(seconds_left):
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return " ".join(parts)
