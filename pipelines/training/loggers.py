"""Where a run's numbers go: metrics.jsonl, TensorBoard, the progress line, the time of a step."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.runs.run_folder import METRICS, RunFolder, read_metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PHASES = ("data", "forward", "backward", "optimizer")


class MetricsLog:
    """Appends readings to metrics.jsonl and TensorBoard, continuing after `start_step`.

    Lines after `start_step` were written by steps that are about to be redone, and are dropped; at
    `start_step` 0 so are all, the reading before the first step included.
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
        """Adds the reading at a step (null where not finite); numbers go to TensorBoard too."""
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
        """Puts everything written so far on disk."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """Ends both logs."""
        self._file.close()
        self._board.close()


def _tensorboard(folder: Path, start_step: int) -> SummaryWriter:
    # Slow to import, and only rank 0 needs it.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1)


class SampleLog:
    """Writes which samples made each step, for audits: one line a step and process.

    `attempt` is the same on all processes of one attempt at training and grows from attempt to
    attempt; of several lines of one step, those with the largest made the final weights.
    """

    def __init__(self, folder: RunFolder, rank: int, attempt: int) -> None:
        self._file = (folder.local / f"samples-rank{rank}-{attempt}.jsonl").open("a")
        self._rank, self._attempt = rank, attempt

    def write(self, step: int, sample_ids: Sequence[Any]) -> None:
        """Adds the samples of optimizer step `step` (from 1), in the order of the batch."""
        ids = [bytes(i).ljust(16, b"\0").hex() for i in sample_ids]
        who = {"rank": self._rank, "attempt": self._attempt, "pid": os.getpid()}
        self._file.write(json.dumps({"step": step, **who, "time": time.time(), "ids": ids}) + "\n")
        self._file.flush()


class StepTimer:
    """Splits the time of a step into `PHASES`, on the device's own clock, without a sync.

    On CUDA the marks are events on the stream, so "data" is the time the device stood idle for want
    of a batch; the host may wait longer without harm. `totals` needs the stream drained: call it
    after a reading.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.start()

    def start(self) -> None:
        """Begins a step (what ran since the last mark is nobody's)."""
        self.mark("")

    def mark(self, phase: str) -> None:
        """Ends a phase that began at the mark before."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def totals(self) -> dict[str, float]:
        """Seconds of each phase since the last call, and starts afresh."""
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
    """Throughput, the split of step time, and peak memory, as metrics."""
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
    """One line for a person: `step 120/500 loss 0.312 rankme 45.1 knn 31.2% 812 img/s wait 3% ...`."""
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
